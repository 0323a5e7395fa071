"""Hop 2/9 on a GPU: the kernel of `observe`: one program per (token, site), or fewer that take turns.

At small batches every program starts at once. At larger ones half as many programs as the chip has multiprocessors take
turns, so that the matrix product beside them keeps the other half (`benchmarks/gpu_forms.py`, 256 tokens: +2 % of a
step against +14 %). A prefill's product is shorter than such turns: there all start at once again.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from maxact_proto import stats
from maxact_vllm import logger
from maxact_vllm.buffers import NUM_ROWS

FIRST_BIN = tl.constexpr(2 * (127 + stats.LOWEST_OCTAVE))
"""Exponent and first bit of the mantissa where the first bin begins, as they stand in a float32."""
_MAX_TENSORS = 8
_BLOCK = 4096
_ALL_AT_ONCE = 128 * 5
"""Programs up to which all start at once."""
_TAKING_TURNS = 66
_TURN_TOKENS = 1024
"""Tokens up to which programs take turns."""
_failed: list[bool] = []
"""Holds something after the first failure."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _reduce_row(  # type: ignore[no-untyped-def]
    x, width, out, stride_stat, histogram, weight, scale, BLOCK: tl.constexpr, BINS: tl.constexpr, COUNTS: tl.constexpr
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
    for start in range(0, width, BLOCK):
        here = start + column < width
        value = tl.load(x + start + column, mask=here, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.where(here, value, float("-inf")))
        bottom = tl.minimum(bottom, tl.where(here, value, float("inf")))
        squares += value * value
        magnitudes += tl.abs(value)
        if COUNTS:
            saturated += (tl.abs(value) > limit).to(tl.float32)
            zeroed += (here & (tl.abs(value) <= zero)).to(tl.float32)
    total = tl.sum(magnitudes, axis=0)
    # Maxima ignore a NaN; the sum does not: let the row say so in its maximum, where the fold looks.
    tl.store(out, tl.where(total == total, tl.max(top, axis=0), total))
    tl.store(out + stride_stat, tl.min(bottom, axis=0))
    tl.store(out + 2 * stride_stat, tl.sum(squares, axis=0))
    tl.store(out + 3 * stride_stat, total)
    if COUNTS:
        tl.store(out + 4 * stride_stat, tl.sum(saturated, axis=0))
        tl.store(out + 5 * stride_stat, tl.sum(zeroed, axis=0))
    if (weight > 0) & (total < float("inf")):
        for start in range(0, width, BLOCK):
            here = start + column < width
            value = tl.load(x + start + column, mask=here, other=0.0).to(tl.float32)
            bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            place = tl.minimum(tl.maximum((bits >> 22) - FIRST_BIN, 0), BINS - 1)
            # What lies behind the row is counted in bins that are not kept.
            counts = tl.histogram(tl.where(here, place, BINS), 2 * BINS)
            kept = tl.arange(0, 2 * BINS)
            tl.atomic_add(histogram + kept, counts.to(tl.int64) * weight, mask=(kept < BINS) & (counts > 0))


@triton.jit(do_not_specialize=["num_tokens"])  # type: ignore[untyped-decorator, unused-ignore]
def _observe_kernel(  # type: ignore[no-untyped-def]
    x0, x1, x2, x3, x4, x5, x6, x7,  # [num_tokens, width], rows contiguous
    s0, s1, s2, s3, s4, s5, s6, s7,  # row strides
    w0, w1, w2, w3, w4, w5, w6, w7,  # widths
    r0, r1, r2, r3, r4, r5, r6, r7,  # sites: where in rows
    rows_ptr,  # float32 [sites, 4 or 6, padded]
    histograms_ptr,  # int64 [sites, BINS]
    sampling_ptr,  # int64 [1]
    scales_ptr,  # float32 [sites, 2]
    num_tokens,
    stride_site,
    stride_stat,
    NUM: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    EVERY: tl.constexpr,
    COUNTS: tl.constexpr,
):  # fmt: skip
    packed = tl.load(sampling_ptr)
    offset = packed & 0xFFFFFFFF
    num_sampled = packed >> 32
    for job in range(tl.program_id(0), num_tokens * NUM, tl.num_programs(0)):
        token = tl.full([], 0, tl.int64) + job // NUM
        which = job % NUM
        out = rows_ptr + token
        chosen = (token < num_sampled) & (token >= offset) & ((token - offset) % EVERY == 0)
        weight = tl.where(chosen, tl.minimum(num_sampled, EVERY), 0)
        if which == 0:
            _reduce_row(
                x0 + token * s0, w0, out + r0 * stride_site, stride_stat,
                histograms_ptr + r0 * BINS, weight, scales_ptr + 2 * r0, BLOCK, BINS, COUNTS,
            )  # fmt: skip
        elif which == 1:
            _reduce_row(
                x1 + token * s1, w1, out + r1 * stride_site, stride_stat,
                histograms_ptr + r1 * BINS, weight, scales_ptr + 2 * r1, BLOCK, BINS, COUNTS,
            )  # fmt: skip
        elif which == 2:
            _reduce_row(
                x2 + token * s2, w2, out + r2 * stride_site, stride_stat,
                histograms_ptr + r2 * BINS, weight, scales_ptr + 2 * r2, BLOCK, BINS, COUNTS,
            )  # fmt: skip
        elif which == 3:
            _reduce_row(
                x3 + token * s3, w3, out + r3 * stride_site, stride_stat,
                histograms_ptr + r3 * BINS, weight, scales_ptr + 2 * r3, BLOCK, BINS, COUNTS,
            )  # fmt: skip
        elif which == 4:
            _reduce_row(
                x4 + token * s4, w4, out + r4 * stride_site, stride_stat,
                histograms_ptr + r4 * BINS, weight, scales_ptr + 2 * r4, BLOCK, BINS, COUNTS,
            )  # fmt: skip
        elif which == 5:
            _reduce_row(
                x5 + token * s5, w5, out + r5 * stride_site, stride_stat,
                histograms_ptr + r5 * BINS, weight, scales_ptr + 2 * r5, BLOCK, BINS, COUNTS,
            )  # fmt: skip
        elif which == 6:
            _reduce_row(
                x6 + token * s6, w6, out + r6 * stride_site, stride_stat,
                histograms_ptr + r6 * BINS, weight, scales_ptr + 2 * r6, BLOCK, BINS, COUNTS,
            )  # fmt: skip
        else:
            _reduce_row(
                x7 + token * s7, w7, out + r7 * stride_site, stride_stat,
                histograms_ptr + r7 * BINS, weight, scales_ptr + 2 * r7, BLOCK, BINS, COUNTS,
            )  # fmt: skip


def observe(
    tensors: list[torch.Tensor],
    rows: torch.Tensor,
    histograms: torch.Tensor,
    sampling: torch.Tensor,
    scales: torch.Tensor,
    sites: list[int],
) -> None:
    """`observe.reference` on the current stream, for up to 8 tensors of as many tokens.

    A kernel that cannot be launched is logged once and observes nothing: the model goes on.
    """
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
    padding = _MAX_TENSORS - len(tensors)
    every = [*tensors, *tensors[:1] * padding]
    num_tokens = tensors[0].shape[0]
    if any(x.shape[0] != num_tokens for x in tensors):
        raise ValueError(f"sites of one group differ in tokens: {[x.shape[0] for x in tensors]}")
    jobs = num_tokens * len(tensors)
    if jobs == 0:
        return
    programs = _TAKING_TURNS if jobs > _ALL_AT_ONCE and num_tokens <= _TURN_TOKENS else jobs
    _observe_kernel[(programs,)](
        *every,
        *(x.stride(0) for x in every),
        *(x.shape[1] for x in every),
        *(*sites, *[0] * padding),
        rows,
        histograms,
        sampling,
        scales,
        num_tokens,
        rows.stride(0),
        rows.stride(1),
        NUM=len(tensors),
        BLOCK=_BLOCK,
        BINS=stats.NUM_BINS,
        EVERY=stats.SAMPLE_EVERY,
        COUNTS=rows.shape[1] > NUM_ROWS,
        num_warps=8,
    )


def fork(
    tensors: list[torch.Tensor],
    rows: torch.Tensor,
    histograms: torch.Tensor,
    sampling: torch.Tensor,
    scales: torch.Tensor,
    sites: list[int],
) -> None:
    """The same on the side stream, behind what the current one has done so far."""
    side = _side_stream(rows.device)
    side.wait_stream(torch.cuda.current_stream(rows.device))
    with torch.cuda.stream(side):
        observe(tensors, rows, histograms, sampling, scales, sites)


def join(tensors: list[torch.Tensor], rows: torch.Tensor) -> None:
    """The current stream waits for the side stream."""
    torch.cuda.current_stream(rows.device).wait_stream(_side_stream(rows.device))


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
