"""Runs an observed engine in a process of its own, with a receiver beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from receiver import Listening, Receiver

ENVIRON = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}
NATIVE = {"enforce_eager": True, "compilation_config": {"custom_ops": ["none"]}}
"""vLLM's eager mode on the op bodies that torch.compile traces: the ground truth for capture."""


@dataclass(frozen=True, slots=True)
class Run:
    """What an engine run left behind."""

    received: Receiver
    raw: dict[str, Any]
    log: str


def run_engine(spec: dict[str, Any], folder: Path, **environ: str) -> Run:
    """Run `run_engine.py` with a receiver beside it; ``spec["maxact"]``: the plugin's settings, None: not asked for."""
    with Listening() as listening:
        process = start_engine(spec, folder, listening.endpoint, **environ)
        process.wait()
        return Run(listening.receiver, *results(process, folder))


def start_engine(spec: dict[str, Any], folder: Path, endpoint: str, **environ: str) -> subprocess.Popen[bytes]:
    """Start `run_engine.py`, streaming to ``endpoint``; its log is ``folder/log``."""
    environ |= spec.pop("environ", {})
    own = spec.pop("maxact", {})
    llm = {"max_num_seqs": 64, "enable_prefix_caching": False, "disable_log_stats": True} | spec["llm"]
    if own is not None:
        llm["additional_config"] = {"maxact": {"endpoint": endpoint, "interval": 0.2} | own}
    (folder / "spec.json").write_text(json.dumps(spec | {"llm": llm}))
    command = [sys.executable, Path(__file__).with_name("run_engine.py"), folder / "spec.json", folder / "raw.npz"]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, env={**os.environ, **ENVIRON, **environ}, stdout=log, stderr=log)


def results(process: subprocess.Popen[bytes], folder: Path) -> tuple[dict[str, Any], str]:
    """What a finished engine wrote: raw tensors and its log."""
    log = (folder / "log").read_text()
    assert process.returncode == 0, log[-4000:]
    with np.load(folder / "raw.npz") as raw:
        return dict(raw), log


def probe(model: Path, additional: dict[str, Any], change: str = "", **environ: str) -> tuple[dict[str, Any], str]:
    """Run `run_probe.py`: what it found, and the log."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("run_probe.py"), model, json.dumps(additional), change],
        env={**os.environ, **ENVIRON, **environ},
        capture_output=True,
        text=True,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    [line] = [line for line in log.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND ")), log


def run_interpreted(script: str) -> str:
    """Run a program under Triton's interpreter that compares a kernel with its reference; what it printed."""
    pytest.importorskip("triton", reason="torch for CPU brings no Triton on this platform")
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, Path(__file__).with_name(script)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kernel and reference agree" in done.stdout
    return done.stdout + done.stderr
