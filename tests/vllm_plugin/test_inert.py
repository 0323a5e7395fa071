"""Installed but not asked for: nothing changes. Asked for, by either door: it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import probe

from maxact_vllm import canary

CHEAP = ("canary", "config", "credentials", "plugin")
"""What registration imports: neither torch nor grpc is behind it."""

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


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
        "patched": sorted(seam.name for seam in (*canary.DOOR, *canary.PATCHED) if seam.kind != "value"),
        "modules": sorted(["maxact_proto", "maxact_vllm", *(f"maxact_vllm.{name}" for name in CHEAP)]),
        "served": disabled["served"],
        "grpc": disabled["grpc"],  # vLLM imports some of it itself
        "additional_config": {},
        "cache_key": disabled["cache_key"],
    }
    assert "maxact" not in "".join(line for line in log.splitlines() if "FOUND" not in line and "WARNING" in line)


def test_the_kill_switch_removes_even_the_flags_and_wins_over_being_asked_for(disabled: dict[str, Any]) -> None:
    assert disabled["patched"] == []
    assert disabled["hooks"] == 0
    assert disabled["modules"] == ["maxact_proto", "maxact_vllm"]


@pytest.mark.parametrize(
    ("additional", "environ"),
    [
        ({}, {"VLLM_PLUGINS": "maxact", "MAXACT_SITES": "attn_output|final_norm"}),
        ({"maxact": {"sites": "attn_output|final_norm"}}, {}),
    ],
    ids=["VLLM_PLUGINS", "additional_config"],
)
def test_asked_for_it_observes(tiny_llama: Path, additional: dict[str, Any], environ: dict[str, str]) -> None:
    found, log = probe(tiny_llama, additional, **environ)
    sites = 2 + 1  # of two layers, and at their end
    assert found["hooks"] == 2 * sites, "a hook collects, a hook observes"
    assert found["buffers"] > sites
    assert found["threads"] == ["maxact-flush", "maxact-stream"]
    called = {"get_model"}
    assert set(found["wrapped"]) == {seam.name for seam in canary.WORKER if seam.kind != "value"} - called
    assert f"maxact observes {sites} sites" in log
    assert "maxact has no sidecar at 127.0.0.1:4471" in log
    assert "tokens flow, yet" not in log
