"""Hop 8/9: what a number format costs a tensor, estimated from its histogram of magnitudes.

One scale of absmax / qmax wastes range where a few elements are much larger than the rest: most then round to zero.
Peak over bulk predicts that error, the peak alone does not (arXiv 2605.15572, Spearman 0.86 against 0.12), and the
closed form 12 qmax^2 / crest^2 is only a bound, because the error of an element that rounds to zero is the element. So
the error is integrated over the histogram, elements spread evenly within a bin; shares and quantiles, which one bin
decides, let its density lean towards those beside it. What lies beyond the last edge (768) counts as in the last bin.

INT-8 keeps within half a dB of quantizing that way; INT-4 does where no single element holds the power. A float errs by
its mantissa everywhere, so where few elements hold the power, the places of those few on the grid decide, which no
histogram tells. The estimate then counts every element's mantissa at its average (`Format.floor_power`): it may be too
low by what the few were lucky, and is hardly ever too high.

A block format is as good as the largest of each block lets it be. That largest is taken to be of ``block`` independent
draws from the histogram. Real outliers keep to a few channels and tokens, so real blocks are more uneven: a few lose
more than estimated and most lose less. Block scales are rounded to their format; that they can underflow (below 2^-18
of the tensor's absmax) is left out.

Shapes: S sites, B bins.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from maxact_proto import stats
from maxact_proto.formats import FORMATS, Format, rounded

Floats = npt.NDArray[np.floating]

INPUTS_OF_LINEAR_LAYERS: Final = frozenset({"attn_input", "o_proj_input", "mlp_input", "down_proj_input"})
"""What quantized layers round; other sites have no resolution to lose."""

_STARTS: Final = np.concatenate([[0.0], stats.BIN_EDGES[1:]])
"""Elements below the first edge are counted in the first bin."""
_WIDTHS: Final = np.diff(_STARTS, append=2 * stats.BIN_EDGES[-2])
OCTAVES: Final = _STARTS[::2]
"""Where each octave begins, ``[B / 2]``; two bins each."""

# The error of a bin in units of scale^2 depends on where it lies relative to the scale: integrated once, for scales
# between two powers of two in `_FRACTIONS` steps and bins up to `_REACH` half octaves away.
_FRACTIONS, _REACH, _POINTS = 32, 2 * stats.NUM_BINS, 16
_ROWS: Final = 64
"""Blocks are computed for so many sites at a time: arrays that are used again, and no threads of BLAS, whose waiting
for each other costs more than it saves."""
_HUGE: Final = 1e30
"""Stands for errors of bins far above the absmax, which are empty; an infinity would not be nothing there."""
_WITHIN: Final = (np.arange(_POINTS) + 0.5) / _POINTS


def _relative_errors(number: Format) -> Floats:
    """``[_FRACTIONS, 2 x _REACH + B]``: mean squared rounding error of a bin, in units of scale squared."""
    places = np.arange(-_REACH, _REACH + stats.NUM_BINS)
    octaves = 2.0 ** (places // 2)
    starts, widths = octaves * (1 + places % 2 / 2), octaves / 2
    points = starts[:, None] + widths[:, None] * _WITHIN
    steps = points / 2 ** ((np.arange(_FRACTIONS) + 0.5) / _FRACTIONS)[:, None, None]
    errors: Floats = ((steps - rounded(steps, number)) ** 2).mean(axis=-1)
    return np.minimum(errors, _HUGE).astype(np.float32)


def _block_tables(number: Format, block_scale: Format) -> tuple[Floats, Floats, Floats]:
    """Of a block whose largest element lies in bin b, by b.

    ``[B, B]`` the mean squared error of another element in bin a, ``[B, B]`` the share of those that round to zero,
    ``[B]`` the mean squared error of the largest itself.
    """
    points = _STARTS[:, None] + _WIDTHS[:, None] * _WITHIN
    # The tensor's scale is anywhere in an octave. E4M3 without its smallest numbers: there, underflow would begin.
    tensor = 2.0 ** _WITHIN[::2]
    scale = rounded(points[..., None] / number.qmax / tensor * 2.0**40, block_scale) * tensor / 2.0**40
    errors, zeroed = (np.zeros((stats.NUM_BINS, stats.NUM_BINS)) for _ in range(2))
    for a in range(stats.NUM_BINS):
        steps = points[a, :, None, None] / scale[a:, None]
        nearest = np.minimum(rounded(steps, number), number.qmax)
        possible = np.broadcast_to(points[a, :, None, None] <= points[a:, None, :, None], steps.shape)
        squares = ((steps - nearest) * scale[a:, None]) ** 2
        errors[a:, a], zeroed[a:, a] = (
            np.average(what, axis=(1, 2, 3), weights=possible) for what in (squares, nearest == 0)
        )
    steps = points[..., None] / scale
    own = ((steps - np.minimum(rounded(steps, number), number.qmax)) * scale) ** 2
    return errors, zeroed, own.mean(axis=(1, 2))


_ERRORS: Final = {
    name: sliding_window_view(_relative_errors(number), stats.NUM_BINS, axis=1)
    for name, number in FORMATS.items()
    if number.block_scale is None
}
_BLOCKS: Final = {
    name: _block_tables(number, number.block_scale) for name, number in FORMATS.items() if number.block_scale
}


def sqnr_decibels(histograms: Floats, absmax: Floats, power: Floats, number: Format) -> Floats:
    """``[S]``: signal to quantization noise ratio, from histograms ``[S, B]``, absmax and mean squares ``[S]``.

    NaN without elements or absmax.
    """
    known = np.where(absmax > 0, absmax, np.nan)
    noise = _block_noise(histograms, number) if number.block else _noise(histograms, known / number.qmax, number)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Floats = 10 * np.log10(power / np.maximum(noise, number.floor_power * power))
    return np.where(np.isfinite(known), ratio, np.nan)


def zeroed_ratio(histograms: Floats, absmax: Floats, number: Format) -> Floats:
    """``[S]``: share of elements that round to zero, from histograms ``[S, B]`` and absmax ``[S]``.

    NaN without elements or absmax.
    """
    known = np.where(absmax > 0, absmax, np.nan)
    if not number.block:
        return _share_below(histograms, known * (number.zeroed_below / number.qmax))
    return np.where(np.isfinite(known), _block_zeroed(histograms, number), np.nan)


def median(histograms: Floats) -> Floats:
    """``[S]``: the median of ``|x|``. NaN without elements."""
    return _quantile(histograms, 0.5)


def limit(median: Floats, number: Format) -> Floats:
    """``[S]``: the magnitude that sets a scale at which half of the elements round to zero, from their median.

    With one scale per tensor that is an absmax, in a block format the largest of a block.
    """
    return median * (number.qmax / number.zeroed_below)


def typical_block_maximum(histograms: Floats, number: Format) -> Floats:
    """``[S]``: the largest of a block, its median over blocks of independent draws. NaN without elements."""
    return _quantile(histograms, 0.5 ** (1 / number.block))


def octave_ratio(histograms: Floats) -> Floats:
    """``[B / 2, S]``: share of elements in each octave. NaN without elements, and outside the octaves that hold any."""
    counted = histograms.reshape(-1, len(OCTAVES), 2).sum(axis=-1, dtype=np.float64)
    reached = np.cumsum(counted, axis=-1)
    everything = reached[:, -1:]
    # An empty octave between others keeps its zero: a gap in the shape is worth seeing.
    within = (reached > 0) & (reached - counted < everything)
    with np.errstate(invalid="ignore"):
        ratio: Floats = np.where(within, counted / everything, np.nan).T
    return ratio


def _noise(histograms: Floats, scale: Floats, number: Format) -> Floats:
    """``[S]``: mean squared error of an element, rounded to the grid of ``scale`` ``[S]``."""
    octave = np.log2(np.where(np.isfinite(scale), scale, 1.0))
    first = 2 * (stats.LOWEST_OCTAVE - np.floor(octave).astype(np.int64))
    fraction = ((octave % 1) * _FRACTIONS).astype(np.int64)
    return scale**2 * _mean(histograms, _ERRORS[number.name][fraction, np.clip(first + _REACH, 0, 2 * _REACH)])


def _block_noise(histograms: Floats, number: Format) -> Floats:
    """``[S]``: mean squared error of an element in blocks with scales of their own."""
    errors, _, own = _BLOCKS[number.name]
    return _over_blocks(histograms, number, errors, own)


def _block_zeroed(histograms: Floats, number: Format) -> Floats:
    """``[S]``: share of elements that round to zero in blocks with scales of their own."""
    _, zeroed, _ = _BLOCKS[number.name]
    return _over_blocks(histograms, number, zeroed, np.zeros(stats.NUM_BINS))


def _over_blocks(histograms: Floats, number: Format, others: Floats, own: Floats) -> Floats:
    """``[S]``: mean over elements of blocks of independent draws.

    ``others [B, B]``: of an element in bin a where the block's largest is in bin b; ``own [B]``: of that largest.
    """
    some = np.flatnonzero(histograms.any(axis=0))
    used = slice(some[0], some[-1] + 1) if some.size else slice(0, 1)
    lower, beside, own = np.tril(others[used, used], -1), np.diagonal(others)[used], own[used]
    mean = np.empty(len(histograms))
    for start in range(0, len(histograms), _ROWS):
        rows = slice(start, start + _ROWS)
        share, below = _shares(histograms[rows, used])
        # That all of a block are in or below a bin, and that all but one are.
        rest = np.ones_like(below)
        every = below
        for _ in range(number.block.bit_length() - 1):  # a power of 16 would take eight times as long
            rest, every = rest * every, every * every
        largest = np.diff(every, axis=-1, prepend=0.0) / number.block
        under = np.einsum("sb,sb->s", np.diff(rest, axis=-1, prepend=0.0) @ lower, share)
        mean[rows] = under + (share * rest - largest) @ beside + largest @ own
    return mean


def _shares(histograms: Floats) -> tuple[Floats, Floats]:
    """``[S, B]``: share of elements in each bin, and up to its end. NaN without elements.

    In float64: their powers would be subnormal in float32, and those take ten times as long.
    """
    counted = histograms.sum(axis=-1, dtype=np.float64, keepdims=True)
    with np.errstate(invalid="ignore"):
        share: Floats = histograms / counted
    return share, np.cumsum(share, axis=-1)


def _share_below(histograms: Floats, magnitude: Floats) -> Floats:
    """``[S]``: share of elements below ``magnitude`` ``[S]``. NaN where either is missing."""
    place = np.clip(np.searchsorted(_STARTS, magnitude, side="right") - 1, 0, stats.NUM_BINS - 1)
    part = np.clip((magnitude - _STARTS[place]) / _WIDTHS[place], 0, 1)
    rows = np.arange(len(histograms))
    reached = np.cumsum(histograms, axis=-1)
    within = part * (1 - _bend(histograms, place) * (1 - part))
    with np.errstate(invalid="ignore"):
        share: Floats = (reached[rows, place] - histograms[rows, place] * (1 - within)) / reached[:, -1]
    return share


def _quantile(histograms: Floats, share: float) -> Floats:
    """``[S]``: the magnitude below which ``share`` of the elements lie. NaN without elements."""
    reached = np.cumsum(histograms, axis=-1)
    wanted = share * reached[:, -1]
    place = (reached < wanted[:, None]).sum(axis=-1).clip(max=stats.NUM_BINS - 1)
    rows = np.arange(len(histograms))
    inside = histograms[rows, place]
    bend = _bend(histograms, place)
    with np.errstate(divide="ignore", invalid="ignore"):
        within = (wanted - (reached[rows, place] - inside)) / inside
        part = 2 * within / (1 - bend + np.sqrt((1 - bend) ** 2 + 4 * bend * within))
    quantile: Floats = _STARTS[place] + _WIDTHS[place] * part
    return quantile


def _bend(histograms: Floats, place: npt.NDArray[np.intp]) -> Floats:
    """``[S]``: how the density runs through bin ``place`` ``[S]``: from 1 - bend to 1 + bend of its mean.

    From the bins beside it, between -1 (falls to nothing) and 1 (rises from nothing). Of the elements of the bin, the
    share u - bend u (1 - u) is below the part u of it.
    """
    rows = np.arange(len(histograms))
    below, above = np.maximum(place - 1, 0), np.minimum(place + 1, stats.NUM_BINS - 1)
    density, lower, upper = (histograms[rows, each] / _WIDTHS[each] for each in (place, below, above))
    centre = _STARTS + _WIDTHS / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (upper - lower) / (centre[above] - centre[below]) * _WIDTHS[place] / 2 / density
    return np.where(density > 0, np.clip(slope, -1, 1), 0)


def _mean(histograms: Floats, per_bin: Floats) -> Floats:
    """Mean of ``per_bin`` ``[S, B]`` over the elements counted in ``histograms`` ``[S, B]``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean: Floats = np.einsum("sb,sb->s", histograms, per_bin) / histograms.sum(axis=-1)
    return mean
