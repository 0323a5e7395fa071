"""Observed engines, started once per session and shared by the tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
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


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, random weights: for what does not depend on weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M, LlamaConfig as C; torch.manual_seed(0);"
        "M.from_config(C(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,"
        " num_key_value_heads=1, vocab_size=256)).bfloat16().save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", script, folder], check=True, capture_output=True)
    return folder
