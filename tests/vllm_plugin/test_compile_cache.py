"""vLLM's compile cache: engines with other sites, or without maxact, share no artefact; the same compiles nothing anew.

All engines of this file start one after another on one cache. An artefact of a whole model, once loaded, runs no hook
and checks no guard: were it made for other sites, or without any, every statistic would be wrong or missing in silence.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import ENVIRON, NATIVE, Run, run_engine

from maxact_proto import stats
from maxact_vllm.config import BESIDE_THE_GRAPH, Settings

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

OTHER = "attn_output|hidden|final_norm"
PROMPTS = [[(7 * index + 3) % 250 for index in range(length)] for length in (5, 12, 30)]


@dataclass(frozen=True, slots=True)
class Start:
    """One engine of the file."""

    run: Run
    compiled: dict[str, int]
    """What vLLM counted: compiled, saved, loaded."""
    new_files: int
    """Files in the cache that were not there before."""

    @property
    def absmax(self) -> dict[str, Any]:
        """Per site, by phase."""
        return dict(zip(self.run.received.sites(), stats.absmax(self.run.received.total()).T, strict=True))


@pytest.fixture(scope="module")
def starts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Start]:
    """Without, with, without again, with again and another endpoint and interval, with other sites."""
    cache = tmp_path_factory.mktemp("cache")

    def start(maxact: dict[str, Any] | None, **llm: Any) -> Start:
        spec = {
            "llm": {"model": str(tiny_llama), "max_model_len": 64, "skip_tokenizer_init": True, "dtype": "float32"}
            | llm,
            "maxact": maxact,
            "artefacts": True,
            "batches": [{"prompts": PROMPTS, "max_tokens": 8}],
        }
        before = files(cache)
        run = run_engine(spec, tmp_path_factory.mktemp("engine"), VLLM_CACHE_ROOT=str(cache))
        [counted] = re.findall("^COMPILED (.*)$", run.log, re.MULTILINE)
        return Start(run, json.loads(counted), len(files(cache) - before))

    return {
        "without": start(None),
        "with": start({}),
        "without again": start(None),
        "with again": start({"interval": 0.3, "engine": "blue"}),
        "other sites": start({"sites": OTHER}),
        "native": start({"sites": "all"}, **NATIVE),
    }


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_without_maxact_nothing_is_observed(starts: dict[str, Start]) -> None:
    for name in ("without", "without again"):
        assert starts[name].run.received.layouts == {}


@pytest.mark.parametrize("name", ["with", "with again", "other sites"])
def test_every_start_has_its_statistics_right(starts: dict[str, Start], name: str) -> None:
    assert starts[name].run.received.tokens() == starts["native"].run.received.tokens()
    assert "tokens flow, yet" not in starts[name].run.log
    for site, seen in starts[name].absmax.items():
        np.testing.assert_allclose(seen, starts["native"].absmax[site], rtol=1e-3, err_msg=site)


def test_a_model_loaded_from_the_cache_measures_what_the_one_that_was_compiled_did(starts: dict[str, Start]) -> None:
    assert starts["with again"].compiled["num_aot_artifacts_loaded"] == 1
    first, again = (starts[name].run.received.total() for name in ("with", "with again"))
    np.testing.assert_array_equal(again[..., : stats.NUM_EXTREMA], first[..., : stats.NUM_EXTREMA])
    np.testing.assert_allclose(again, first, rtol=1e-6)  # sums over other windows


@pytest.mark.parametrize("name", ["without", "with", "other sites"])
def test_what_was_not_there_yet_is_compiled(starts: dict[str, Start], name: str) -> None:
    assert starts[name].compiled["num_aot_compiles"] == 1
    assert starts[name].compiled["num_aot_artifacts_loaded"] == 0


def test_a_second_start_compiles_and_saves_no_more_than_vllm_alone(starts: dict[str, Start]) -> None:
    alone, observed = starts["without again"], starts["with again"]
    assert observed.compiled == alone.compiled
    assert alone.compiled["num_aot_compiles"] == 0
    assert observed.new_files <= alone.new_files
    print(f"second start, new files in the cache: vLLM alone {alone.new_files}, observed {observed.new_files}")


KEYS = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from maxact_vllm import config as ours

def key(change=None, **maxact):
    additional = {} if maxact.pop("without", False) else {"maxact": maxact}
    made = EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, additional_config=additional)
    config = made.create_engine_config()
    if change:
        change(config)
    return config.compute_hash()

print("KEYS", json.dumps({
    "not asked for": key(without=True),
    "serving": key(),
    "serving, said": key(sites="serving"),
    "another endpoint": key(endpoint="unix:/run/other", interval=5, engine="blue"),
    "paper": key(sites="paper"),
    "all": key(sites="all"),
    "a pattern": key(sites="hidden"),
    "disowned": key(ours.disown),
    "spoilt": key(ours.spoil),
    "spoilt again": key(ours.spoil),
}))
"""


@pytest.fixture(scope="module")
def keys(tiny_llama: Path) -> dict[str, str]:
    """Compile-cache keys by what was asked for."""
    command = [sys.executable, "-c", KEYS, tiny_llama]
    done = subprocess.run(command, env={**os.environ, **ENVIRON}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = re.findall("^KEYS (.*)$", done.stdout, re.MULTILINE)
    found: dict[str, str] = json.loads(line)
    return found


def test_other_sites_have_another_key(keys: dict[str, str]) -> None:
    different = ("not asked for", "serving", "paper", "all", "a pattern", "spoilt", "spoilt again")
    assert len({keys[name] for name in different}) == len(different)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("disowned", "not asked for"),
        ("serving, said", "serving"),
        ("another endpoint", "serving"),
    ],
)
def test_the_same_graph_has_the_same_key(keys: dict[str, str], name: str, same: str) -> None:
    assert keys[name] == keys[same]


def test_of_every_setting_it_is_decided_whether_it_enters_the_key() -> None:
    assert {field.name for field in fields(Settings)} - BESIDE_THE_GRAPH == {"sites"}
