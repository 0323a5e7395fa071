"""INT-8 error from histograms, against quantize-dequantize of the same values, and the flag that follows from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from processes import Sidecar
from workers import SITES, WIDTH

from maxact_proto import stats
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


@pytest.mark.parametrize("kind", ["normal", "laplace", "massive activation", "gated"])
@pytest.mark.parametrize("factor", [1.0, 0.73, 31.0, 1e-3])
def test_error_from_the_histogram_is_that_of_quantizing(kind: str, factor: float) -> None:
    x = values(kind) * factor
    scale = np.abs(x).max() / 127
    steps = np.rint(x / scale)
    noise = ((x - steps * scale) ** 2).mean()
    counts, scales = histogram(x), np.array([scale])
    estimated = resolution.sqnr_db(np.array([(x**2).mean()]), resolution.noise_power(counts, scales))
    assert estimated[0] == pytest.approx(10 * np.log10((x**2).mean() / noise), abs=0.5)
    assert resolution.zeroed_ratio(counts, scales)[0] == pytest.approx((steps == 0).mean(), abs=0.01)


def test_at_the_limit_half_of_the_elements_round_to_zero() -> None:
    x = values("laplace")
    limit = resolution.median_limit(histogram(x))
    assert limit[0] == pytest.approx(254 * np.median(np.abs(x)), rel=0.02)
    assert resolution.zeroed_ratio(histogram(x), limit / 127)[0] == pytest.approx(0.5, abs=1e-6)


def test_without_elements_nothing_is_known() -> None:
    nothing, scale = np.zeros((1, stats.NUM_BINS), np.float32), np.array([0.1])
    for unknown in (
        resolution.zeroed_ratio(nothing, scale),
        resolution.noise_power(nothing, scale),
        resolution.noise_power(histogram(values("normal")), np.array([np.nan])),
        resolution.median_limit(nothing),
    ):
        assert np.isnan(unknown).all()


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
    assert (flag["meaning"], flag["site"], flag["absmax"]) == ("resolution", "down_proj_input", SPIKE)
    assert flag["limit"] == pytest.approx(254 * np.median(np.abs(values("normal"))), rel=0.03)
    site = sidecar.get("sites")[DOWN_PROJ]
    assert site["int8_zeroed_ratio"] > 0.95
    scraped = sidecar.scrape()
    assert 'maxact_int8_sqnr_db{model_name="tiny/llama",engine="0",layer="0",site="hidden"}' in scraped
    assert f'maxact_int8_zeroed_ratio{{model_name="tiny/llama",engine="0",site="embedding"}} {0.9:.1f}'[:-1] in scraped
    worker.close()


def test_a_few_tokens_are_not_judged_by_their_median(patient_sidecar: Sidecar) -> None:
    sidecar = patient_sidecar
    worker = sidecar.connect()
    worker.send(SPIKE, histogram=counts_of(values("normal")) / 10)
    assert not any(flag["active"] for flag in sidecar.get("flags"))
    worker.close()
