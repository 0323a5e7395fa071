"""Number formats against those who implement them: torch's casts, Python's half, and the list of E2M1."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from maxact_proto.formats import FORMATS, FP16_LIMIT, rounded

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def magnitudes(qmax: float) -> Any:
    """Float32 values over the whole range of a format and far below, halfway points included."""
    rng = np.random.default_rng(0)
    spread = qmax * 2.0 ** rng.uniform(-40, 0, 200_000)
    halves = np.arange(0, min(qmax, 512)) + 0.5
    return np.concatenate([[0.0, qmax], halves, spread]).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_a_float_rounds_as_torch_casts(name: str) -> None:
    import torch

    values = magnitudes(FORMATS[name].qmax)
    dtype = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[name]
    cast = torch.tensor(values, dtype=torch.float32).to(dtype).double().numpy()
    np.testing.assert_array_equal(rounded(values, FORMATS[name]), cast)
    info = torch.finfo(dtype)
    assert (FORMATS[name].qmax, FORMATS[name].smallest) == (info.max, info.smallest_normal * info.eps)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_an_integer_rounds_to_the_nearest(name: str) -> None:
    values = magnitudes(FORMATS[name].qmax)
    np.testing.assert_array_equal(rounded(values, FORMATS[name]), np.rint(values))


def test_nvfp4_rounds_to_the_nearest_of_its_eight_magnitudes() -> None:
    values = magnitudes(6.0)
    distance = np.abs(values[:, None] - np.array(E2M1))
    nearest = np.abs(rounded(values, FORMATS["nvfp4"]) - values)
    np.testing.assert_array_equal(nearest, distance.min(axis=1))
    assert set(rounded(values, FORMATS["nvfp4"])) == set(E2M1)


@pytest.mark.parametrize("name", FORMATS)
def test_what_rounds_to_zero_ends_where_it_is_said_to(name: str) -> None:
    number = FORMATS[name]
    edge = number.zeroed_below
    assert rounded(np.array([edge, np.nextafter(edge, 1e9)]), number).tolist() == [0.0, number.smallest]


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_the_floor_of_the_noise_is_what_rounding_costs_a_value_of_any_place_in_its_octave(name: str) -> None:
    number = FORMATS[name]
    values = 2.0 ** np.random.default_rng(0).uniform(-3, 5, 400_000)
    share = (((values - rounded(values, number)) / values) ** 2).mean()
    assert number.floor_power == pytest.approx(share, rel=0.03)


def test_the_largest_half_is_a_half_and_the_next_is_none() -> None:
    assert struct.unpack("e", struct.pack("e", FP16_LIMIT)) == (FP16_LIMIT,)
    with pytest.raises(OverflowError):
        struct.pack("e", FP16_LIMIT + 32)
