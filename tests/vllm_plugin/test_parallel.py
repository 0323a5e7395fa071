"""Tensor and pipeline parallelism: what the ranks of an engine send, merged, is what one rank alone sends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import NATIVE, Run

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
            "environ": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if len(llm) > len(NATIVE) else {},
        }
    )


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
    sharded = {site.name for site in run.received.layouts["pp0tp1"].sites if site.sharded}
    assert sharded == {"o_proj_input", "mlp_gate", "down_proj_input"}, "both ranks hold the one head"
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
