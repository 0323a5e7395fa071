"""Observed engines, started once per session and shared by the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from engines import Run, run_engine


@pytest.fixture(scope="session")
def engine_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Run]:
    """Runs a spec once per session."""
    runs: dict[str, Run] = {}

    def run(spec: dict[str, Any]) -> Run:
        key = json.dumps(spec, sort_keys=True)
        if key not in runs:
            runs[key] = run_engine(json.loads(key), tmp_path_factory.mktemp("engine"))
        return runs[key]

    return run
