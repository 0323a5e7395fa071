"""Hop 8/9: what a symmetric integer scale costs, estimated from histograms of magnitudes.

A per-tensor scale of absmax / qmax wastes range where a few elements are much larger than the rest: most then round to
zero. Peak over bulk predicts that error, the peak alone does not (arXiv 2605.15572, Spearman 0.86 against 0.12), and
the closed form 12 qmax^2 / crest^2 is only a bound, because the error of an element that rounds to zero is the element.
So the error is integrated over the histogram, elements spread evenly within a bin. Shapes: S sites, B bins.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from maxact_proto import stats

Floats = npt.NDArray[np.floating]

INT8_QMAX: Final = 127
"""Largest magnitude of symmetric INT-8."""
INPUTS_OF_LINEAR_LAYERS: Final = frozenset({"attn_input", "o_proj_input", "mlp_input", "down_proj_input"})
"""What W8A8 quantizes; other sites have no resolution to lose."""

_STARTS: Final = np.concatenate([[0.0], stats.BIN_EDGES[1:]])
"""Elements below the first edge are counted in the first bin."""
_WIDTHS: Final = np.diff(_STARTS, append=2 * stats.BIN_EDGES[-2])

# The error of a bin in units of scale^2 depends on where it lies relative to the scale: integrated once, for scales
# between two powers of two in `_FRACTIONS` steps and bins up to `_REACH` half octaves away.
_FRACTIONS, _REACH, _POINTS = 32, stats.NUM_BINS, 16


def _relative_errors() -> Floats:
    """``[_FRACTIONS, 2 x _REACH + 1]``: mean squared rounding error of a bin, in units of scale squared."""
    places = np.arange(-_REACH, _REACH + 1)
    octaves = 2.0 ** (places // 2)
    starts, widths = octaves * (1 + places % 2 / 2), octaves / 2
    points = starts[:, None] + widths[:, None] * (np.arange(_POINTS) + 0.5) / _POINTS
    steps = points / 2 ** ((np.arange(_FRACTIONS) + 0.5) / _FRACTIONS)[:, None, None]
    errors: Floats = ((steps - np.rint(steps)) ** 2).mean(axis=-1)
    return errors


_ERRORS: Final = _relative_errors()


def zeroed_ratio(histograms: Floats, scale: Floats) -> Floats:
    """``[S]``: share of elements that round to zero at ``scale`` ``[S]``: ``|x| < scale / 2``. NaN without elements."""
    below = np.clip((scale[:, None] / 2 - _STARTS) / _WIDTHS, 0, 1)
    return _mean(histograms, below)


def noise_power(histograms: Floats, scale: Floats) -> Floats:
    """``[S]``: mean squared error of an element, rounded to multiples of ``scale`` ``[S]``.

    Nothing is clipped: the scale is that of the absmax. NaN without elements or scale.
    """
    known = np.where(scale > 0, scale, np.nan)
    octave = np.log2(np.where(np.isfinite(known), known, 1.0))
    first = np.arange(stats.NUM_BINS) + 2 * (stats.LOWEST_OCTAVE - np.floor(octave).astype(np.int64)[:, None])
    fraction = ((octave % 1) * _FRACTIONS).astype(np.int64)[:, None]
    return known**2 * _mean(histograms, _ERRORS[fraction, np.clip(first, -_REACH, _REACH) + _REACH])


def sqnr_db(signal_power: Floats, noise: Floats) -> Floats:
    """``[S]``: signal to quantization noise ratio in dB, from mean squares ``[S]``; NaN where either is missing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Floats = 10 * np.log10(signal_power / noise)
    return ratio


def median_limit(histograms: Floats) -> Floats:
    """``[S]``: the absmax at whose INT-8 scale half of the elements round to zero: 2 x 127 x median of ``|x|``.

    NaN without elements.
    """
    counted = histograms.sum(axis=-1)
    reached = np.cumsum(histograms, axis=-1)
    place = (reached < counted[:, None] / 2).sum(axis=-1).clip(max=stats.NUM_BINS - 1)
    rows = np.arange(len(histograms))
    within = histograms[rows, place]
    with np.errstate(divide="ignore", invalid="ignore"):
        missing = (counted / 2 - (reached[rows, place] - within)) / within
    limit: Floats = 2 * INT8_QMAX * (_STARTS[place] + _WIDTHS[place] * missing)
    return limit


def _mean(histograms: Floats, per_bin: Floats) -> Floats:
    """Mean of ``per_bin`` ``[S, B]`` over the elements counted in ``histograms`` ``[S, B]``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean: Floats = (histograms * per_bin).sum(axis=-1) / histograms.sum(axis=-1)
    return mean
