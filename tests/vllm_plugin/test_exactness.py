"""Capture against the tensors themselves, against other engines, and against transformers. Real weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import NATIVE, Run

from maxact_proto import stats
from maxact_proto.formats import FORMATS
from maxact_sidecar import resolution

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

LENGTHS = [*range(1, 300, 13), 300]
DECODED = 5


def prompts(lengths: list[int], seed: int) -> list[list[int]]:
    """Random token ids: every prompt meets other activations."""
    rng = np.random.default_rng(seed)
    return [rng.integers(10, 40_000, length).tolist() for length in lengths]


BATCHES = [
    {"prompts": prompts(LENGTHS, 0), "max_tokens": 1},
    {"prompts": prompts([16] * 8, 1), "max_tokens": DECODED},
]
TOKENS = [len(LENGTHS) + 8, sum(LENGTHS) - len(LENGTHS) + 8 * 15, 8 * (DECODED - 1)]

NUM_ROWS = 120
EVERY_ROW = [{"prompts": prompts([1], 3), "max_tokens": NUM_ROWS}]
"""Steps of one row each: `run_engine` has all of them counted in the histogram."""

SHORT = [{"prompts": prompts([5, 33, 64, 100], 2), "max_tokens": 1}]
"""For comparisons between engines: nothing decoded, so that all see the same tokens."""


@pytest.fixture(scope="session")
def counted(engine_run: Callable[..., Run], smollm2: Path) -> Run:
    return engine_run(spec(smollm2, **NATIVE) | {"batches": EVERY_ROW, "formats": True})


def spec(model: Path, *, raw: bool = False, chunk: int | None = None, **llm: Any) -> dict[str, Any]:
    """All sites of SmolLM2 in one process."""
    chunking = {"enable_chunked_prefill": chunk is not None, "max_num_batched_tokens": chunk or 8192}
    return {
        "llm": {"model": str(model), "max_model_len": 512} | chunking | llm,
        "maxact": {"sites": "all"},
        "idle_seconds": 1.0,
        "raw": raw,
        "batches": BATCHES if raw else SHORT,
    }


@pytest.fixture(scope="session", params=["whole prefill", "chunked prefill"])
def native(request: Any, engine_run: Callable[..., Run], smollm2: Path) -> Run:
    chunk = None if request.param == "whole prefill" else 512
    return engine_run(spec(smollm2, raw=True, chunk=chunk, **NATIVE))


@pytest.fixture(scope="session")
def single(engine_run: Callable[..., Run], smollm2: Path) -> Run:
    return engine_run(spec(smollm2, dtype="float32", **NATIVE))


@pytest.fixture(scope="session")
def compiled(engine_run: Callable[..., Run], smollm2: Path) -> Run:
    return engine_run(spec(smollm2, dtype="float32"))


def decode_rows(raw: dict[str, Any]) -> Any:
    """Which rows of a raw run are decode rows: those of the second batch behind its 16-token prompts."""
    rows = np.zeros(len(raw["positions"]), bool)
    rows[-8 * (DECODED - 1) :] = True
    return rows


def test_extrema_of_every_site_and_phase_are_bit_equal_to_the_raw_tensors(native: Run) -> None:
    seen = native.received.total()
    first, decode = native.raw["positions"] == 0, decode_rows(native.raw)
    assert (native.raw["positions"][decode] >= 16).all()
    masks = (first, ~first & ~decode, decode)
    names = native.received.sites()
    assert len(names) == 30 * 10 + 2
    for index, name in enumerate(names):
        for phase, rows in enumerate(masks):
            top, bottom = native.raw[name][rows].T
            assert seen[phase, index, stats.MAX] == top.max(), (name, phase)
            assert seen[phase, index, stats.MIN] == bottom.min(), (name, phase)


def test_token_counts_are_exact(native: Run) -> None:
    assert native.received.tokens() == TOKENS


@pytest.mark.parametrize("run", ["single", "compiled"])
def test_warm_up_alone_leaves_every_statistic_empty(run: str, request: Any) -> None:
    windows = request.getfixturevalue(run).received.windows["pp0tp0"]
    early = [window for window in windows if not any(window.tokens)]
    assert early, "no window was closed before the first request"
    assert windows.index(early[0]) == 0
    np.testing.assert_array_equal(windows[0].values, stats.empty(windows[0].values.shape[1]))
    np.testing.assert_array_equal(windows[0].lifetime, windows[0].values[..., : stats.NUM_EXTREMA])


def test_compiled_absmax_is_within_two_percent_of_eager(single: Run, compiled: Run) -> None:
    expected, seen = (stats.absmax(run.received.total()) for run in (single, compiled))
    here = np.isfinite(expected)
    deviation = np.abs(seen[here] / expected[here] - 1)
    print(f"compiled against eager, float32: worst {deviation.max():.2e}, median {np.median(deviation):.2e}")
    assert deviation.max() < 0.02
    assert expected.max(axis=0).argmax() == seen.max(axis=0).argmax()


def test_compiled_token_counts_and_sums_agree_with_eager(single: Run, compiled: Run) -> None:
    assert compiled.received.tokens() == single.received.tokens()
    for column in (stats.SUM_SQUARES, stats.SUM_ABS):
        expected, seen = (run.received.total()[..., column] for run in (single, compiled))
        np.testing.assert_allclose(seen, expected, rtol=0.02)


@dataclass(frozen=True, slots=True)
class Costs:
    """Of every site, what a format costs it: estimated from the histogram, and of the same tensors. ``[S]``."""

    sites: list[str]
    decibels: Any
    """Estimated less true SQNR."""
    zeroed: Any
    """Estimated less true share."""
    plain: Any
    """True where no single element holds a tenth of the power."""


def costs(counted: Run, name: str) -> Costs:
    number = FORMATS[name]
    histogram, total = counted.received.histogram(), counted.received.total()
    assert (histogram.sum(axis=-1) == NUM_ROWS * counted.received.widths()).all(), "every element is counted once"
    absmax = stats.absmax(total).max(axis=0)
    energy = total[..., stats.SUM_SQUARES].sum(axis=0)
    sites = counted.received.sites()
    true = np.array([counted.raw[site][list(FORMATS).index(name)] for site in sites])
    found = Costs(
        sites=sites,
        decibels=resolution.sqnr_decibels(histogram, absmax, energy / histogram.sum(axis=-1), number) - true[:, 0],
        zeroed=resolution.zeroed_ratio(histogram, absmax, number) - true[:, 1],
        plain=absmax**2 < energy / 10,
    )
    off, plain = np.abs(found.decibels), np.abs(found.decibels[found.plain])
    print(
        f"{number.title}: {len(sites)} sites, true SQNR {true[:, 0].min():.1f} to {true[:, 0].max():.1f} dB; estimate "
        f"off by {np.median(off):.2f} dB (median), {off.max():.2f} dB at most ({sites[off.argmax()]}), "
        f"{plain.max():.2f} dB at most on the {plain.size} sites without a dominant element, "
        f"{found.decibels.max():.2f} dB too high at most; zeroed off by {np.abs(found.zeroed).max():.4f} at most"
    )
    return found


def test_int8_error_from_the_histogram_is_that_of_quantizing_the_same_tensors(counted: Run) -> None:
    found = costs(counted, "int8")
    assert np.abs(found.decibels).max() < 0.5
    assert np.abs(found.zeroed).max() < 0.01


def test_int4_error_from_the_histogram_is_near_but_where_one_element_holds_the_power(counted: Run) -> None:
    found = costs(counted, "int4")
    assert np.abs(found.decibels[found.plain]).max() < 0.5
    assert np.abs(found.decibels).max() < 4.5
    assert np.abs(found.zeroed).max() < 0.02


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_is_hardly_ever_promised_better_than_it_is(counted: Run, name: str) -> None:
    found = costs(counted, name)
    assert found.decibels.max() < 1.5
    assert np.abs(found.decibels[found.plain]).max() < 3
    assert np.abs(found.zeroed).max() < 0.02


def test_nvfp4_is_near_though_real_blocks_are_not_drawn_at_random(counted: Run) -> None:
    found = costs(counted, "nvfp4")
    assert found.decibels.max() < 1.5
    assert np.abs(found.decibels[found.plain]).max() < 1.5
    assert np.abs(found.zeroed).max() < 0.15


def test_the_sample_of_large_steps_weighs_as_much_as_the_whole(native: Run) -> None:
    elements = sum(TOKENS) * native.received.widths()
    share = native.received.histogram().sum(axis=-1) / elements
    assert (np.abs(share - 1) < 0.15).all()


def test_hidden_absmax_per_layer_is_within_two_percent_of_transformers(single: Run, smollm2: Path) -> None:
    expected = transformers_hidden(smollm2)
    absmax = stats.absmax(single.received.total()).max(axis=0)
    seen = {name: absmax[index] for index, name in enumerate(single.received.sites())}
    for layer, value in enumerate(expected):
        assert seen[f"{layer}.hidden"] == pytest.approx(value, rel=0.02), layer


def transformers_hidden(model_path: Path) -> list[float]:
    """Absmax of the output of each decoder layer over the same prompts, in transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    peaks = [0.0] * len(model.model.layers)

    def watch(index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            peaks[index] = max(peaks[index], float(hidden.abs().max()))

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(watch(index))
    with torch.inference_mode():
        for ids in SHORT[0]["prompts"]:
            model(torch.tensor([ids]))
    return peaks
