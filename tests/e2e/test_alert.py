"""The same chain with a real vLLM in front: prompts, plugin, sidecar, Prometheus, Alertmanager, webhook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import watchers
from e2e_alert import LEFT_OUT, PROVOKED
from grafana.assets import ALERTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result(smollm2: Path) -> dict[str, Any]:
    """RESULT of ``make e2e-alert``: a compiled vLLM, calm prompts as the card, then prompts of other kinds."""
    if missing := watchers.missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)}")
    command = [sys.executable, "scripts/e2e_alert.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    last = done.stdout.rpartition("RESULT ")[2]
    assert last, done.stderr
    loaded: dict[str, Any] = json.loads(last)
    return loaded | {"stderr": done.stderr}


@pytest.mark.engine
@pytest.mark.server
@pytest.mark.timeout(900)
def test_a_prompt_that_leaves_the_card_becomes_a_notification(result: dict[str, Any], capsys: Any) -> None:
    with capsys.disabled():
        shown = {name: value for name, value in result.items() if name != "stderr"}
        sys.stdout.write(f"\ne2e-alert: {json.dumps(shown)}\n")
    assert result["spike_to_metric_s"] <= 1.0
    assert result["spike_to_notification_s"] <= 15
    answered, asked = result["queries_with_data"].split("/")
    assert answered == asked, result["stderr"]
    assert int(asked) > 90
    assert set(PROVOKED) <= set(result["alerts"])
    assert set(PROVOKED) | set(LEFT_OUT) == set(ALERTS), "an alert is neither provoked here nor said to be left out"
    assert result["ok"]
