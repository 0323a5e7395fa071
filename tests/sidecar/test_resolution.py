"""What formats cost, from histograms, against quantize-dequantize of the same values; the flag that follows from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from processes import Sidecar
from workers import SITES, WIDTH

from maxact_proto import stats
from maxact_proto.formats import FORMATS, Format, rounded
from maxact_sidecar import resolution

DOWN_PROJ = 2
SPIKE = 400.0


def values(kind: str) -> Any:
    """40,000 activations of a shape that is met in models."""
    rng = np.random.default_rng(0)
    bulk = rng.normal(size=40_000) * 0.3
    if kind == "laplace":
        return rng.laplace(size=bulk.size)
    if kind == "massive activation":
        bulk[7] = SPIKE
    if kind == "gated":
        bulk *= rng.normal(size=bulk.size) * rng.choice([1.0, 0.01], bulk.size)
    return bulk


def histogram(x: Any) -> Any:
    """Counts of ``|x|``, ``[1, bins]``."""
    edges = np.concatenate([[0.0], stats.BIN_EDGES[1:], [np.inf]])
    return np.histogram(np.abs(x), edges)[0][None].astype(np.float32)


INT8, NVFP4 = FORMATS["int8"], FORMATS["nvfp4"]
FACTORS = [1.0, 0.73, 31.0, 1e-3]
KINDS = ["normal", "laplace", "massive activation", "gated"]


def quantized(x: Any, number: Format) -> Any:
    """What is left of ``x``, in blocks of neighbours where the format has blocks."""
    size, absmax = np.abs(x), np.abs(x).max()
    if not number.block_scale:
        scale = absmax / number.qmax
    else:
        tensor_scale = absmax / number.qmax / number.block_scale.qmax
        largest = size.reshape(-1, number.block).max(axis=1, keepdims=True)
        scale = rounded(largest / number.qmax / tensor_scale, number.block_scale) * tensor_scale
        size = size.reshape(-1, number.block)
    steps = np.where(scale > 0, size / np.where(scale > 0, scale, 1), 0)
    return np.sign(x) * (np.minimum(rounded(steps, number), number.qmax) * scale).reshape(x.shape)


def estimated(x: Any, number: Format) -> tuple[float, float]:
    """SQNR in dB and zeroed share, from the histogram."""
    absmax, power = np.abs(x).max(keepdims=True), (x**2).mean(keepdims=True)
    counts = histogram(x)
    return (
        resolution.sqnr_decibels(counts, absmax, power, number)[0],
        resolution.zeroed_ratio(counts, absmax, number)[0],
    )


def true(x: Any, number: Format) -> tuple[float, float]:
    near = quantized(x, number)
    return 10 * np.log10((x**2).mean() / ((x - near) ** 2).mean()), (near == 0).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", FACTORS)
def test_error_of_int8_is_that_of_quantizing(kind: str, factor: float) -> None:
    decibels, zeroed = estimated(values(kind) * factor, INT8)
    expected = true(values(kind) * factor, INT8)
    assert decibels == pytest.approx(expected[0], abs=0.5)
    assert zeroed == pytest.approx(expected[1], abs=0.01)


@pytest.mark.parametrize("kind", ["normal", "laplace", "gated"])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", ["int4", "fp8_e4m3", "fp8_e5m2", "nvfp4"])
def test_error_of_other_formats_is_that_of_quantizing_what_has_no_dominant_element(
    name: str, kind: str, factor: float
) -> None:
    decibels, zeroed = estimated(values(kind) * factor, FORMATS[name])
    expected = true(values(kind) * factor, FORMATS[name])
    assert decibels == pytest.approx(expected[0], abs=1)
    assert zeroed == pytest.approx(expected[1], abs=0.01)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", ["int4", "fp8_e4m3", "fp8_e5m2", "nvfp4"])
def test_where_one_element_holds_the_power_no_luck_is_counted_on(name: str, factor: float) -> None:
    number, x = FORMATS[name], values("massive activation") * factor
    decibels, zeroed = estimated(x, number)
    expected = true(x, number)
    assert zeroed == pytest.approx(expected[1], abs=0.01)
    assert decibels < expected[0]
    if name != "int4":
        # That element is on the grid, and here it holds 98 % of the power: rounding costs nothing but the rest.
        bound = -10 * np.log10(number.floor_power)
        assert bound - 3 < decibels < bound + 1e-6 < expected[0] - 5


def test_blocks_that_are_no_random_draws_are_estimated_as_if_they_were() -> None:
    x = np.sort(values("laplace"))  # neighbours are alike: blocks as kind as they can be
    assert estimated(x, NVFP4)[1] - true(x, NVFP4)[1] > 0.1


@pytest.mark.parametrize("name", ["int8", "int4", "fp8_e4m3", "fp8_e5m2"])
def test_at_the_limit_half_of_the_elements_round_to_zero(name: str) -> None:
    x, number = values("laplace"), FORMATS[name]
    limit = resolution.limit(resolution.median(histogram(x)), number)
    assert limit[0] == pytest.approx(number.qmax / number.zeroed_below * np.median(np.abs(x)), rel=0.02)
    assert resolution.zeroed_ratio(histogram(x), limit, number)[0] == pytest.approx(0.5, abs=1e-6)


def test_blocks_whose_largest_is_at_the_limit_lose_half_of_their_elements() -> None:
    counts = np.zeros((1, stats.NUM_BINS), np.float32)
    counts[0, [20, 29]] = (0.8, 0.2)  # 24 times the smaller is in the bin of the larger
    limit = resolution.limit(resolution.median(counts), NVFP4)
    largest = resolution.typical_block_maximum(counts, NVFP4)
    assert limit[0] / largest[0] == pytest.approx(1, abs=0.3)
    assert resolution.zeroed_ratio(counts, np.array([1.0]), NVFP4)[0] == pytest.approx(0.5, abs=0.3)


@pytest.mark.parametrize("number", FORMATS.values(), ids=lambda number: number.name)
def test_without_elements_or_absmax_nothing_is_known(number: Format) -> None:
    nothing, some, one = np.zeros((1, stats.NUM_BINS), np.float32), histogram(values("normal")), np.array([1.0])
    for unknown in (
        resolution.zeroed_ratio(nothing, one, number),
        resolution.zeroed_ratio(some, np.array([np.nan]), number),
        resolution.sqnr_decibels(nothing, one, one, number),
        resolution.sqnr_decibels(some, np.array([np.nan]), one, number),
        resolution.limit(resolution.median(nothing), number),
    ):
        assert np.isnan(unknown).all()


@pytest.mark.parametrize("number", FORMATS.values(), ids=lambda number: number.name)
@pytest.mark.parametrize("absmax", [1e-30, 1e-6, 1e6, 3e38])
def test_no_scale_is_too_small_or_too_large_to_estimate(number: Format, absmax: float) -> None:
    counts, peak = histogram(values("normal")), np.array([absmax])
    assert not np.isnan(resolution.sqnr_decibels(counts, peak, np.array([1.0]), number)).any()
    assert 0 <= resolution.zeroed_ratio(counts, peak, number)[0] <= 1


def counts_of(x: Any) -> Any:
    """The same histogram for every site of `workers`, of 300 tokens."""
    return np.repeat(histogram(x) * (300 * WIDTH / x.size), len(SITES), axis=0)


def test_a_spike_over_a_small_bulk_raises_the_flag_of_the_linear_input_only(patient_sidecar: Sidecar) -> None:
    sidecar = patient_sidecar
    worker = sidecar.connect()
    worker.send(1.5, histogram=counts_of(values("normal")))
    assert not any(flag["active"] for flag in sidecar.get("flags"))
    worker.send(SPIKE)
    [flag] = [flag for flag in sidecar.get("flags") if flag["active"]]
    assert (flag["meaning"], flag["format"], flag["site"]) == ("resolution", "int8", "down_proj_input")
    assert flag["absmax"] == SPIKE
    assert flag["limit"] == pytest.approx(254 * np.median(np.abs(values("normal"))), rel=0.03)
    site = sidecar.get("sites")[DOWN_PROJ]
    assert site["formats"]["int8"]["zeroed_ratio"] > 0.95
    assert site["formats"]["int8"]["headroom_ratio"] == pytest.approx(flag["headroom_ratio"])
    scraped = sidecar.scrape()
    assert 'maxact_sqnr_decibels{model_name="tiny/llama",engine="0",layer="0",site="hidden",format="int8"}' in scraped
    assert 'maxact_zeroed_ratio{model_name="tiny/llama",engine="0",site="embedding",format="int8"} ' in scraped
    worker.close()


def test_a_few_tokens_are_not_judged_by_their_median(patient_sidecar: Sidecar) -> None:
    sidecar = patient_sidecar
    worker = sidecar.connect()
    worker.send(SPIKE, histogram=counts_of(values("normal")) / 10)
    assert not any(flag["active"] for flag in sidecar.get("flags"))
    worker.close()
