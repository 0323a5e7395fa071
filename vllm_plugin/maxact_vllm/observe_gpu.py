"""Hop 2/9 on a GPU: the kernel of `observe`, one program per (token, site).

It reduces every row. Rows of the sample have programs of their own in the same launch, in front of the others, which
count their elements too: per program first, because atomic additions of one element each queue up where many fall into
one bin, as zeros and the values of an untrained model do. Widths are constants of the kernel: its loops unroll, so that
all loads of a row are under way at once (docs/performance.md).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from maxact_proto import stats
from maxact_vllm import compat, logger
from maxact_vllm.buffers import NUM_ROWS
from maxact_vllm.observe import MOST_ROWS, SAMPLING_BITS

FIRST_BIN = tl.constexpr(2 * (127 + stats.LOWEST_OCTAVE))
"""Exponent and first bit of the mantissa where the first bin begins, as they stand in a float32."""
FIELD_BITS = tl.constexpr(SAMPLING_BITS)
FIELD = tl.constexpr((1 << SAMPLING_BITS) - 1)
COUNTED = tl.constexpr(MOST_ROWS)
_BLOCK = 2048
_WARPS = 8
_failed: list[bool] = []
"""Holds something after the first failure."""
_forks: list[torch.cuda.Event] = []
"""Where the next branch begins."""
_branches: list[torch.cuda.Stream] = []
"""What the current stream has to wait for."""
_compiled: dict[tuple[Any, ...], Any] = {}
"""Kernels by all that Triton specialized them on. Triton's own look at every argument of every launch holds the host up
for longer than the kernel takes, and a large prefill, which no CUDA graph replays, is launched from there."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _merge(top, bottom, squares, magnitudes, top2, bottom2, squares2, magnitudes2):  # type: ignore[no-untyped-def]
    return tl.maximum(top, top2), tl.minimum(bottom, bottom2), squares + squares2, magnitudes + magnitudes2


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _reduce_row(  # type: ignore[no-untyped-def]
    x, WIDTH: tl.constexpr, out, stride_stat, scale, BLOCK: tl.constexpr, COUNTS: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    bottom = tl.full([BLOCK], float("inf"), tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    magnitudes = tl.zeros([BLOCK], tl.float32)
    saturated = tl.zeros([BLOCK], tl.float32)
    zeroed = tl.zeros([BLOCK], tl.float32)
    if COUNTS:
        limit = tl.load(scale)
        zero = tl.load(scale + 1)
    for start in tl.static_range(0, WIDTH, BLOCK):
        here = start + column < WIDTH
        value = tl.load(x + start + column, mask=here, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.where(here, value, float("-inf")))
        bottom = tl.minimum(bottom, tl.where(here, value, float("inf")))
        squares += value * value
        magnitudes += tl.abs(value)
        if COUNTS:
            saturated += (tl.abs(value) > limit).to(tl.float32)
            zeroed += (here & (tl.abs(value) <= zero)).to(tl.float32)
    # One reduction of all four: each waits for all warps.
    highest, lowest, sum_squares, total = tl.reduce((top, bottom, squares, magnitudes), 0, _merge)
    # Maxima ignore a NaN; the sum does not: let the row say so in its maximum, where the fold looks.
    tl.store(out, tl.where(total == total, highest, total))
    tl.store(out + stride_stat, lowest)
    tl.store(out + 2 * stride_stat, sum_squares)
    tl.store(out + 3 * stride_stat, total)
    if COUNTS:
        tl.store(out + 4 * stride_stat, tl.sum(saturated, axis=0))
        tl.store(out + 5 * stride_stat, tl.sum(zeroed, axis=0))
    return total


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _count_row(  # type: ignore[no-untyped-def]
    x, WIDTH: tl.constexpr, histogram, weight, BLOCK: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        place = tl.minimum(tl.maximum((bits >> 22) - FIRST_BIN, 0), BINS - 1)
        counts += tl.histogram(place, BINS, mask=column < WIDTH)
    tl.atomic_add(histogram + tl.arange(0, BINS), counts * weight, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _observe_kernel(  # type: ignore[no-untyped-def]
    tensors,  # tuple of [num_tokens, width], rows contiguous
    rows,  # float32 [sites, 4 or 6, padded]
    histograms,  # int64 [sites, BINS]
    sampling,  # int64 [1]
    scales,  # float32 [sites, 4]
    STRIDES: tl.constexpr,  # of the rows of each tensor
    WIDTHS: tl.constexpr,
    SITES: tl.constexpr,  # where in rows, histograms and scales
    STRIDE_SITE: tl.constexpr,
    STRIDE_STAT: tl.constexpr,
    STRIDE_SCALE: tl.constexpr,
    NUM: tl.constexpr,
    BINS: tl.constexpr,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    which = tl.program_id(0) % NUM
    turn = tl.program_id(0) // NUM
    packed = tl.load(sampling)
    weight = (packed >> FIELD_BITS) & FIELD
    last = (packed >> 2 * FIELD_BITS).to(tl.int32)
    # A row that is counted is reduced in its turn as well: both write the same.
    counted = turn < COUNTED
    row = tl.where(counted, ((packed & FIELD) + turn * weight).to(tl.int32), turn - COUNTED)
    token = row.to(tl.int64)
    for index in tl.static_range(NUM):
        if (which == index) & ((turn >= COUNTED) | (row < last)):
            x = tensors[index] + token * STRIDES[index]
            out = rows + SITES[index] * STRIDE_SITE + token
            total = _reduce_row(x, WIDTHS[index], out, STRIDE_STAT, scales + SITES[index] * STRIDE_SCALE, BLOCK, COUNTS)
            if counted & (total < float("inf")):
                _count_row(x, WIDTHS[index], histograms + SITES[index] * BINS, weight, BLOCK, BINS)


def observe(
    tensors: list[torch.Tensor],
    rows: torch.Tensor,
    histograms: torch.Tensor,
    sampling: torch.Tensor,
    scales: torch.Tensor,
    sites: list[int],
) -> None:
    """`observe.reference` on the current stream, for tensors of as many tokens.

    A kernel that cannot be launched is logged once and observes nothing: the model goes on.
    """
    join([], rows)  # a branch whose end did not run: no graph may end with one
    try:
        if tensors and not _failed:
            _launch(tensors, rows, histograms, sampling, scales, sites)
    except Exception:
        _failed.append(True)
        logger.exception("maxact cannot observe on this GPU; serving goes on")


def _launch(
    tensors: list[torch.Tensor],
    rows: torch.Tensor,
    histograms: torch.Tensor,
    sampling: torch.Tensor,
    scales: torch.Tensor,
    sites: list[int],
) -> None:
    num_tokens = tensors[0].shape[0]
    if any(x.shape[0] != num_tokens for x in tensors):
        raise ValueError(f"sites of one group differ in tokens: {[x.shape[0] for x in tensors]}")
    if num_tokens == 0:
        return
    operands = (tuple(tensors), rows, histograms, sampling, scales)
    strides, widths = tuple(x.stride(0) for x in tensors), tuple(x.shape[1] for x in tensors)
    shape = (strides, widths, tuple(sites), rows.stride(0), rows.stride(1), scales.stride(0), len(tensors))
    constants = (*shape, stats.NUM_BINS, rows.shape[1] > NUM_ROWS, _BLOCK)
    aligned = tuple(x.data_ptr() % 16 == 0 for x in (*tensors, rows, histograms, sampling, scales))
    kind = (constants, aligned, tuple(x.dtype for x in tensors))
    stream = torch.cuda.current_stream(rows.device).cuda_stream if rows.is_cuda else None
    grid = ((MOST_ROWS + num_tokens) * len(tensors), 1, 1)
    compiled = _compiled.get(kind)
    if compiled:
        compiled[grid](*operands, *constants, stream=stream)
    else:
        _compiled[kind] = _observe_kernel[grid](*operands, *constants, num_warps=_WARPS)


def fork(tensors: list[torch.Tensor], rows: torch.Tensor) -> None:
    """A branch of the CUDA graph begins here, if there is one.

    Launched from the host, a branch would hold that up longer than it saves the GPU; where each stretch between two
    attentions is a graph of its own, it would outlive that graph: then there is none.
    """
    _forks.clear()
    if torch.cuda.is_current_stream_capturing() and not compat.captures_pieces():
        _forks.append(torch.cuda.current_stream(rows.device).record_event())


def branch(
    tensors: list[torch.Tensor],
    rows: torch.Tensor,
    histograms: torch.Tensor,
    sampling: torch.Tensor,
    scales: torch.Tensor,
    sites: list[int],
    behind: list[torch.Tensor],
) -> None:
    """`observe` from the fork on: on a side stream, behind what the current one had done by then."""
    if not _forks:
        observe(tensors, rows, histograms, sampling, scales, sites)
        return
    side = _side_stream(rows.device)
    side.wait_event(_forks.pop())
    with torch.cuda.stream(side):
        observe(tensors, rows, histograms, sampling, scales, sites)
    _branches.append(side)


def join(tensors: list[torch.Tensor], rows: torch.Tensor) -> None:
    """The current stream waits for the branch, if there is one."""
    while _branches:
        torch.cuda.current_stream(rows.device).wait_stream(_branches.pop())


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
