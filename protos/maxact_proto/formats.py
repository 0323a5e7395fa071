"""Number formats that activations are quantized to: what each can hold, what it rounds to zero, how it errs.

A format stands for its grid: the magnitudes it represents, in units of a scale. With one scale for a whole tensor that
scale is absmax / qmax, so that nothing is clipped. An integer is a float without normal numbers: its steps are all one
size. A block format has a scale per ``block`` consecutive elements of a row, itself a number of ``block_scale``.

Noise is what rounding to the nearest costs: mean square of (value - nearest), no other model. It is `rounded` that the
sidecar integrates over histograms; the closed forms below are its limits, for people and for bounds:

- equal steps: step^2 / 12, for values spread evenly over many steps (Widrow and Kollar, Quantization Noise, 2008);
- below half of the smallest step: the value itself, all of it is lost (from the definition of rounding);
- normal floats: x^2 x 4^-m / (32 ln 2) for m mantissa bits (integral of step^2 / 12 over an octave, log x even).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

FP16_LIMIT: Final = 65504.0
"""Largest finite half: (2 - 2^-10) x 2^15 (IEEE 754-2019, binary16)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One number format; magnitudes in units of the scale."""

    name: str
    """In settings and as the label ``format``."""
    title: str
    """For people."""
    qmax: float
    """Largest magnitude."""
    smallest: float
    """Smallest magnitude above zero, and the distance to the next."""
    mantissa_bits: int | None
    """Of normal numbers; None where all steps are alike."""
    block: int = 0
    """Consecutive elements that share a scale; 0: the whole tensor."""
    block_scale: Format | None = None
    """Format of a block's scale, over one scale for the whole tensor."""
    source: str
    """Where the numbers come from."""

    @property
    def zeroed_below(self) -> float:
        """Magnitudes up to here round to zero, by ties to even: half of the smallest."""
        return self.smallest / 2

    @property
    def floor_power(self) -> float:
        """Noise over signal power that no scale undercuts on average, 0 for integers.

        Every element errs by its mantissa, so where few elements hold the power their mantissas decide: of a block
        format that of the block's scale, for the largest element of a block is as exact as the scale.
        """
        scale = self.block_scale or self
        return 0.0 if scale.mantissa_bits is None else 4.0**-scale.mantissa_bits / (32 * math.log(2))


_E4M3: Final = Format(
    name="fp8_e4m3",
    title="FP8 E4M3",
    qmax=448.0,
    smallest=2.0**-9,
    mantissa_bits=3,
    source="OCP 8-bit Floating Point Specification (OFP8) 1.0: max 1.75 x 2^8, min subnormal 2^-9",
)

FORMATS: Final = {
    each.name: each
    for each in (
        Format(
            name="int8",
            title="INT-8",
            qmax=127.0,
            smallest=1.0,
            mantissa_bits=None,
            source="two's complement without -128, as symmetric quantization uses it",
        ),
        Format(
            name="int4",
            title="INT-4",
            qmax=7.0,
            smallest=1.0,
            mantissa_bits=None,
            source="two's complement without -8, as symmetric quantization uses it",
        ),
        _E4M3,
        Format(
            name="fp8_e5m2",
            title="FP8 E5M2",
            qmax=57344.0,
            smallest=2.0**-16,
            mantissa_bits=2,
            source="OCP 8-bit Floating Point Specification (OFP8) 1.0: max 1.75 x 2^15, min subnormal 2^-16",
        ),
        Format(
            name="nvfp4",
            title="NVFP4",
            qmax=6.0,
            smallest=0.5,
            mantissa_bits=1,
            block=16,
            block_scale=_E4M3,
            source="OCP Microscaling Formats Specification 1.0: E2M1 is 0, 0.5, 1, 1.5, 2, 3, 4, 6; NVIDIA NVFP4: an "
            "E4M3 scale per 16 elements over one FP32 scale absmax / (6 x 448) per tensor",
        ),
    )
}
"""By name."""


def rounded(values: Floats, number: Format) -> Floats:
    """The nearest that ``number`` represents, ties to even; ``values`` are not negative and in units of the scale.

    Beyond ``qmax`` the grid goes on: with a scale of absmax / qmax nothing is there.
    """
    step: Floats | float = number.smallest
    if number.mantissa_bits is not None:
        least_exponent = math.log2(number.smallest) + number.mantissa_bits
        _, exponent = np.frexp(values)
        step = np.exp2(np.maximum(exponent - 1, least_exponent) - number.mantissa_bits)
    nearest: Floats = np.rint(values / step) * step
    return nearest
