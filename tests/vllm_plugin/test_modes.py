"""What vLLM does between a request and a forward: cached prefixes, drafts, preemption. Computed rows count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import NATIVE, Run

from maxact_proto import stats

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

BLOCK = 128
"""Tokens of a block of the CPU build's KV cache."""


def serve(engine_run: Callable[..., Run], model: Path, batches: list[dict[str, Any]], **llm: Any) -> Run:
    fixed = {"model": str(model), "max_model_len": 1024, "skip_tokenizer_init": True, "block_size": BLOCK}
    return engine_run({"llm": fixed | NATIVE | llm, "maxact": {"sites": "all"}, "batches": batches})


def prompt(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(3, 250, length).tolist()
    return tokens


def test_tokens_from_the_prefix_cache_are_not_computed_and_not_counted(
    engine_run: Callable[..., Run], tiny_llama: Path
) -> None:
    batch = {"prompts": [prompt(2 * BLOCK + 44)], "max_tokens": 3}
    run = serve(engine_run, tiny_llama, [batch, batch], enable_prefix_caching=True)
    assert run.received.tokens() == [1, 2 * BLOCK + 43 + 44, 2 * 2]
    assert sum(window.cached for window in run.received.windows["pp0tp0"]) == 2 * BLOCK


def test_drafts_of_speculative_decoding_count_as_decode_rows(engine_run: Callable[..., Run], tiny_llama: Path) -> None:
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    batch = {"prompts": [prompt(8) * 6], "max_tokens": 40}
    run = serve(engine_run, tiny_llama, [batch], speculative_config=speculation)
    first, prefill, decode = run.received.tokens()
    assert (first, prefill) == (1, 47)
    assert decode > 39, "no draft was verified"
    assert np.isfinite(stats.absmax(run.received.total())).all()


def test_what_is_computed_again_after_a_preemption_counts_again(
    engine_run: Callable[..., Run], tiny_llama: Path
) -> None:
    # Three requests of one block each that grow into a third, and room for six blocks.
    batch = {"prompts": [prompt(24, seed) for seed in range(3)], "max_tokens": 60}
    run = serve(engine_run, tiny_llama, [batch], block_size=32, max_model_len=160, num_gpu_blocks_override=7)
    first, prefill, decode = run.received.tokens()
    assert first > 3, "nobody was preempted"
    assert prefill == first * 23
    assert decode >= 3 * 59
