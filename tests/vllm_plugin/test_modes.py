"""What vLLM does between a request and a forward: cached prefixes, drafts, preemption. Computed rows count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import NATIVE, Run
from safetensors.torch import save_file

from maxact_proto import stats

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

BLOCK = 128
"""Tokens of a block of the CPU build's KV cache."""


def serve(
    engine_run: Callable[..., Run], model: Path, batches: list[dict[str, Any]], *, raw: bool = False, **llm: Any
) -> Run:
    fixed = {"model": str(model), "max_model_len": 1024, "skip_tokenizer_init": True, "block_size": BLOCK}
    return engine_run({"llm": fixed | NATIVE | llm, "maxact": {"sites": "all"}, "batches": batches, "raw": raw})


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


def test_with_an_adapter_every_site_is_what_the_adapted_modules_see(
    engine_run: Callable[..., Run], tiny_llama: Path, tmp_path: Path
) -> None:
    batch = {"prompts": [prompt(20), prompt(9, seed=1)], "max_tokens": 3}
    adapted = batch | {"adapter": str(write_adapter(tmp_path, tiny_llama))}
    lora = {"enable_lora": True, "max_lora_rank": 8}
    plain = serve(engine_run, tiny_llama, [batch], raw=True, **lora)
    run = serve(engine_run, tiny_llama, [adapted], raw=True, **lora)
    for seen in (plain, run):
        extrema = seen.received.total()[..., : stats.NUM_EXTREMA].max(axis=0)
        for index, name in enumerate(seen.received.sites()):
            assert extrema[index, stats.MAX] == seen.raw[name][:, 0].max(), name
    changed = {name for name in run.received.sites() if not np.array_equal(run.raw[name], plain.raw[name])}
    assert {"0.mlp_gate", "0.o_proj_input", "1.hidden"} <= changed, "the adapter did nothing"


def write_adapter(folder: Path, model: Path) -> Path:
    """A random LoRA of rank 8 on every linear layer of a Llama."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    attention = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
    attention |= {"o_proj": (queries, hidden)}
    mlp = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for block, shapes in (("self_attn", attention), ("mlp", mlp)):
            for name, (width_in, width_out) in shapes.items():
                path = f"base_model.model.model.layers.{layer}.{block}.{name}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(8, width_in, generator=draw)
                tensors[f"{path}.lora_B.weight"] = torch.randn(width_out, 8, generator=draw)
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = [*attention, *mlp]
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "bias": "none", "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_a_pooling_model_is_served_unobserved_with_one_warning(engine_run: Callable[..., Run], smollm2: Path) -> None:
    pooling = {"runner": "pooling", "convert": "embed", "skip_tokenizer_init": False}
    run = serve(engine_run, smollm2, [{"prompts": [prompt(9)], "embed": True}], **pooling)
    assert "served a batch" in run.log
    assert run.log.count("maxact does not observe this engine: pooling models are not observed") == 1
    assert not run.received.layouts
