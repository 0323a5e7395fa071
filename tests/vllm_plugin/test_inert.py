"""Installed but not asked for: nothing changes. Asked for, by either door: it is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engines import ENVIRON

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def probe(model: Path, additional: dict[str, Any], **environ: str) -> tuple[dict[str, Any], str]:
    script = Path(__file__).with_name("run_probe.py")
    done = subprocess.run(
        [sys.executable, script, model, json.dumps(additional)],
        env={**os.environ, **ENVIRON, **environ},
        capture_output=True,
        text=True,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    [line] = [line for line in log.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND ")), log


@pytest.fixture(scope="module")
def disabled(tiny_llama: Path) -> dict[str, Any]:
    """The same engine with the kill switch on: what vLLM does by itself."""
    return probe(tiny_llama, {}, MAXACT_DISABLE="1", VLLM_PLUGINS="maxact")[0]


def test_installed_but_not_asked_for_leaves_no_hook_no_thread_and_no_grpc(
    tiny_llama: Path, disabled: dict[str, Any]
) -> None:
    found, log = probe(tiny_llama, {})
    assert found == {
        "hooks": 0,
        "buffers": 0,
        "threads": [],
        "wrapped": [],
        "patched": True,
        "modules": ["maxact_proto", "maxact_vllm", "maxact_vllm.compat", "maxact_vllm.config", "maxact_vllm.plugin"],
        "grpc": disabled["grpc"],  # vLLM imports some of it itself
    }
    assert "maxact" not in "".join(line for line in log.splitlines() if "FOUND" not in line and "WARNING" in line)


def test_the_kill_switch_removes_even_the_flags_and_wins_over_being_asked_for(disabled: dict[str, Any]) -> None:
    assert not disabled["patched"]
    assert disabled["hooks"] == 0
    assert disabled["modules"] == ["maxact_proto", "maxact_vllm"]


@pytest.mark.parametrize(
    ("additional", "environ"),
    [
        ({}, {"VLLM_PLUGINS": "maxact", "MAXACT_SITES": "paper"}),
        ({"maxact": {"sites": "paper"}}, {}),
    ],
    ids=["VLLM_PLUGINS", "additional_config"],
)
def test_asked_for_it_observes(tiny_llama: Path, additional: dict[str, Any], environ: dict[str, str]) -> None:
    found, log = probe(tiny_llama, additional, **environ)
    sites = 2 * 3 + 2  # hidden, attn_output and mlp_output of two layers; embedding and final_norm
    # Here every site is a group: a hook collects, a hook observes; rows and histogram of each, one sample for all.
    assert (found["hooks"], found["buffers"]) == (2 * sites, 2 * sites + 1)
    assert found["threads"] == ["maxact-flush", "maxact-stream"]
    assert found["wrapped"] == ["execute_model", "load_model"]
    assert f"maxact observes {sites} sites" in log
    assert "maxact has no sidecar at 127.0.0.1:4471" in log
    assert "tokens flow, yet" not in log
