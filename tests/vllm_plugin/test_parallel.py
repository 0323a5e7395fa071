"""Tensor and pipeline parallelism: what the ranks of an engine send, merged, is what one rank alone sends. Data
parallel ranks are engines."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from engines import ENVIRON, NATIVE, Run
from processes import Sidecar, program, wait_for
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from watchers import free_port

from maxact_proto import stats
from maxact_sidecar import merge
from maxact_sidecar.config import make_settings
from maxact_sidecar.fleet import Fleet
from maxact_sidecar.headroom import Instant
from maxact_sidecar.snapshot import Snapshot

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROMPTS = [list(range(3, 3 + length)) for length in (1, 9, 40)]
DECODED = 4
TOKENS = (3, 47, 3 * (DECODED - 1))


def serve(engine_run: Callable[..., Run], model: Path, **llm: Any) -> Run:
    """All sites of the tiny model in float32, so that only the order of additions differs between engines."""
    return engine_run(
        {
            "llm": {"model": str(model), "max_model_len": 128, "dtype": "float32", "skip_tokenizer_init": True} | llm,
            "maxact": {"sites": "all"},
            "batches": [{"prompts": PROMPTS, "max_tokens": DECODED}],
            "linger_seconds": 1.5,
            "environ": {"VLLM_CPU_OMP_THREADS_BIND": _bound(llm)} if len(llm) > len(NATIVE) else {},
        }
    )


def _bound(llm: dict[str, Any]) -> str:
    """Each worker on one of two cores."""
    workers = llm.get("tensor_parallel_size", 1) * llm.get("pipeline_parallel_size", 1)
    return "|".join(str(worker % 2) for worker in range(workers))


def merged(run: Run) -> Snapshot:
    """The engine as the sidecar sees it."""
    fleet, now = Fleet(make_settings()), Instant(1e9, 1e3)
    for rank, layout in run.received.layouts.items():
        engine, state = fleet.attach(layout)
        for window in run.received.windows[rank]:
            assert engine.merge_window(state, window, now)
    [snapshot] = fleet.snapshots(now)
    return snapshot


@pytest.fixture(scope="module")
def alone(engine_run: Callable[..., Run], tiny_llama: Path) -> Snapshot:
    return merged(serve(engine_run, tiny_llama, **NATIVE))


def assert_same(snapshot: Snapshot, alone: Snapshot) -> None:
    """Sites, tokens and elements exactly; extrema and sums up to the order of additions."""
    assert set(snapshot.keys) == set(alone.keys)
    assert snapshot.tokens == alone.tokens == TOKENS
    order = [snapshot.keys.index(key) for key in alone.keys]
    assert [snapshot.sites[at].width for at in order] == [site.width for site in alone.sites]
    np.testing.assert_array_equal(snapshot.total.elements[:, order], alone.total.elements)
    np.testing.assert_allclose(snapshot.total.extrema[..., order], alone.total.extrema, rtol=1e-3, atol=1e-5)
    for row in (merge.SQUARES, merge.MAGNITUDES):
        np.testing.assert_allclose(snapshot.total.sums[row][:, order], alone.total.sums[row], rtol=1e-3)
    shares = [each.histogram / each.histogram.sum(axis=-1, keepdims=True) for each in (snapshot, alone)]
    np.testing.assert_allclose(shares[0][order], shares[1], atol=0.01)


def test_two_tensor_parallel_ranks_merge_to_what_one_sees(
    engine_run: Callable[..., Run], tiny_llama: Path, alone: Snapshot
) -> None:
    run = serve(engine_run, tiny_llama, tensor_parallel_size=2, **NATIVE)
    assert sorted(run.received.layouts) == ["pp0tp0", "pp0tp1"]
    second = run.received.layouts["pp0tp1"].sites
    assert {site.name for site in second if site.sharded} == {"o_proj_input", "mlp_gate", "down_proj_input"}
    assert not {site.name for site in second} & {"k", "v"}, "both ranks hold the one head"
    assert_same(merged(run), alone)


def test_two_pipeline_stages_send_their_layers_by_global_index(
    engine_run: Callable[..., Run], tiny_llama: Path, alone: Snapshot
) -> None:
    # Compiled: in eager mode vLLM's own pipeline parallelism fails on CPUs.
    run = serve(engine_run, tiny_llama, pipeline_parallel_size=2, compilation_config={}, async_scheduling=False)
    layouts = run.received.layouts
    assert sorted(layouts) == ["pp0tp0", "pp1tp0"]
    layers = [{site.layer for site in layouts[rank].sites if site.name == "mlp_input"} for rank in sorted(layouts)]
    assert layers == [{0}, {1}]
    assert_same(merged(run), alone)


def test_every_phase_was_served(alone: Snapshot) -> None:
    assert (alone.total.sums[merge.TOKENS] > 0).all()
    assert len(alone.keys) == 2 * 10 + 2
    assert (alone.total.sums[merge.TOKENS][stats.DECODE] == TOKENS[stats.DECODE]).all()


def test_four_ranks_of_a_model_of_experts_that_hold_two_heads_twice_merge_to_what_one_sees(
    engine_run: Callable[..., Run], tiny_experts: Path
) -> None:
    alone = merged(serve(engine_run, tiny_experts, **NATIVE))
    # Not expert parallel: there vLLM's own CPU kernel for experts crashes, with maxact or without.
    run = serve(engine_run, tiny_experts, tensor_parallel_size=4, **NATIVE)
    assert {"moe_input", "router_logits"} <= {site.name for site in run.received.layouts["pp0tp3"].sites}
    holders = [rank for rank, layout in run.received.layouts.items() if "k" in {site.name for site in layout.sites}]
    assert sorted(holders) == ["pp0tp0", "pp0tp2"]
    assert_same(merged(run), alone)


@pytest.fixture(scope="module")
def tiny_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight experts, four heads of queries and two of keys, random weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-experts"
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **heads, **experts)).bfloat16().save_pretrained(folder)
    return folder


def test_data_parallel_ranks_are_engines_of_one_model(
    patient_sidecar: Sidecar, tiny_llama: Path, tmp_path: Path
) -> None:
    with serving(tiny_llama, patient_sidecar, tmp_path / "vllm.log") as url:
        body = {"model": str(tiny_llama), "prompt": PROMPTS[1], "max_tokens": DECODED, "ignore_eos": True}
        for rank in (0, 1, 1):
            answer = httpx.post(
                f"{url}/v1/completions",
                json=body | {"detokenize": False},
                headers={"X-data-parallel-rank": str(rank)},
                timeout=60,
            )
            answer.raise_for_status()
        label = f'maxact_tokens_total{{model_name="{tiny_llama}",engine='
        expected = {
            f'{label}"{rank}",phase="{phase}"}} {requests * tokens:.1f}'
            for rank, requests in ((0, 1), (1, 2))
            for phase, tokens in zip(stats.PHASES, (1, len(PROMPTS[1]) - 1, DECODED - 1), strict=True)
        }
        wait_for(lambda: expected <= set(patient_sidecar.scrape().splitlines()), 20)


@contextlib.contextmanager
def serving(model: Path, sidecar: Sidecar, log: Path) -> Iterator[str]:
    """The address of a server with two data parallel engines."""
    url = f"http://127.0.0.1:{free_port()}"
    flags = ["--port", url.rpartition(":")[2], "--data-parallel-size", "2", "--enforce-eager", "--max-model-len", "128"]
    command = [program("vllm"), "serve", model, *flags, "--skip-tokenizer-init", "--maxact-endpoint", sidecar.grpc]
    environ = {**os.environ, **ENVIRON, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with log.open("wb") as file:
        server = subprocess.Popen(command, env=environ, stdout=file, stderr=file)

    def is_up() -> bool:
        assert server.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/health").is_success
        return False

    try:
        wait_for(is_up, 400)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
