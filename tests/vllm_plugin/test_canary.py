"""A vLLM that is not as maxact knows it: found before anything is touched, said in one line, served unobserved."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from changes import ACCIDENTS, CHANGES
from engines import ENVIRON, probe

from maxact_vllm import canary

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

FLAGS_GONE = ("from_cli_args is gone", "from_cli_args is a method", "add_cli_args takes more")
NOTHING_PATCHED = "compute_hash is gone"
BY_WORKER = ("get_model is gone", "execute_model takes another argument")


@pytest.fixture(scope="module")
def looks() -> dict[str, Any]:
    """What the canary says of vLLM with each change, and without (``""``)."""
    command = [sys.executable, Path(__file__).with_name("changes.py")]
    done = subprocess.run(command, env={**os.environ, **ENVIRON}, capture_output=True, text=True)
    found = [json.loads(line) for line in re.findall("^LOOK (.*)$", done.stdout, re.MULTILINE)]
    assert len(found) == 1 + len(CHANGES), done.stderr[-3000:]
    return {look.pop("name"): look for look in found}


def test_nothing_is_wrong_with_the_vllm_that_is_installed_here(looks: dict[str, Any]) -> None:
    assert looks[""]["faults"] == []
    assert looks[""]["settings"]["maxact"]["sites"] == "serving"
    assert looks[""]["lines"] == []


@pytest.mark.parametrize("change", CHANGES)
def test_a_name_that_is_gone_or_takes_something_else_is_named(looks: dict[str, Any], change: str) -> None:
    assert looks[change]["faults"] == [CHANGES[change].said]


@pytest.mark.parametrize("change", FLAGS_GONE)
def test_where_no_flag_can_be_added_registration_says_so_in_one_line(looks: dict[str, Any], change: str) -> None:
    assert looks[change]["lines"] == [f"maxact stays out of the way, flags included: {CHANGES[change].said}"]


def test_flags_are_taken_and_left_unused_where_nothing_can_be_observed(looks: dict[str, Any]) -> None:
    look = looks[NOTHING_PATCHED]
    assert look["settings"] == {}
    assert look["lines"] == [
        f"maxact stays out of the way, serving goes on unobserved: {CHANGES[NOTHING_PATCHED].said}"
    ]


@pytest.mark.parametrize("change", BY_WORKER)
def test_what_only_a_worker_knows_is_left_to_it(looks: dict[str, Any], change: str) -> None:
    assert looks[change]["settings"] == looks[""]["settings"]
    assert looks[change]["lines"] == []


@pytest.mark.parametrize("change", [NOTHING_PATCHED, "execute_model takes another argument"])
def test_serving_goes_on_unobserved_with_exactly_one_line(tiny_llama: Path, change: str) -> None:
    found, log = probe(tiny_llama, {"maxact": {}}, change)
    assert found["served"] == 2
    assert (found["hooks"], found["buffers"], found["threads"], found["wrapped"]) == (0, 0, [], [])
    assert found["additional_config"] == {}, "what is compiled is kept under vLLM's own key"
    lines = [line for line in log.splitlines() if re.search("(WARNING|ERROR).*maxact", line)]
    assert len(lines) == 1, lines
    assert CHANGES[change].said.partition(".")[2] in lines[0]


def test_a_graph_that_is_ours_in_part_is_never_found_in_the_cache_again(tiny_llama: Path) -> None:
    [(accident, change)] = ACCIDENTS.items()
    found, log = probe(tiny_llama, {"maxact": {}}, accident)
    assert found["served"] == 2
    assert (found["hooks"] > 0, found["threads"]) == (True, [])
    assert list(found["additional_config"]["maxact"]) == ["spoilt"]
    assert "maxact does not observe this model: instrumenting failed" in log
    assert change.said in log


def test_a_version_that_nobody_tried_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "RUN", ("0.1", "0.2"))
    import vllm

    assert canary.untried() == (
        f"maxact was run on vLLM 0.1, 0.2, not on {vllm.__version__}; what it wraps is in place, so it observes"
    )
