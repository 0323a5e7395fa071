"""Hop 2/9 on a GPU: the kernel of `observe`: one program per (token, site), or fewer that take turns.

At small batches every program starts at once. At larger ones half as many programs as the chip has multiprocessors take
turns, so that the matrix product beside them keeps the other half (`benchmarks/gpu_forms.py`, 256 tokens: +2 % of a
step against +14 %). A prefill's product is shorter than such turns: there all start at once again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MAX_TENSORS = 8
_BLOCK = 4096
_ALL_AT_ONCE = 128 * 5
"""Programs up to which all start at once."""
_TAKING_TURNS = 66
_TURN_TOKENS = 1024
"""Tokens up to which programs take turns."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _reduce_row(x, width, out, stride_stat, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    bottom = tl.full([BLOCK], float("inf"), tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    magnitudes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        here = start + column < width
        value = tl.load(x + start + column, mask=here, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.where(here, value, float("-inf")))
        bottom = tl.minimum(bottom, tl.where(here, value, float("inf")))
        squares += value * value
        magnitudes += tl.abs(value)
    total = tl.sum(magnitudes, axis=0)
    # Maxima ignore a NaN; the sum does not: let the row say so in its maximum, where the fold looks.
    tl.store(out, tl.where(total == total, tl.max(top, axis=0), total))
    tl.store(out + stride_stat, tl.min(bottom, axis=0))
    tl.store(out + 2 * stride_stat, tl.sum(squares, axis=0))
    tl.store(out + 3 * stride_stat, total)


@triton.jit(do_not_specialize=["num_tokens"])  # type: ignore[untyped-decorator, unused-ignore]
def _observe_kernel(  # type: ignore[no-untyped-def]
    x0, x1, x2, x3, x4, x5, x6, x7,  # [num_tokens, width], rows contiguous
    s0, s1, s2, s3, s4, s5, s6, s7,  # row strides
    w0, w1, w2, w3, w4, w5, w6, w7,  # widths
    r0, r1, r2, r3, r4, r5, r6, r7,  # sites: where in rows
    rows_ptr,  # float32 [sites, 4, padded]
    num_tokens,
    stride_site,
    stride_stat,
    NUM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    for job in range(tl.program_id(0), num_tokens * NUM, tl.num_programs(0)):
        token = tl.full([], 0, tl.int64) + job // NUM
        which = job % NUM
        out = rows_ptr + token
        if which == 0:
            _reduce_row(x0 + token * s0, w0, out + r0 * stride_site, stride_stat, BLOCK)
        elif which == 1:
            _reduce_row(x1 + token * s1, w1, out + r1 * stride_site, stride_stat, BLOCK)
        elif which == 2:
            _reduce_row(x2 + token * s2, w2, out + r2 * stride_site, stride_stat, BLOCK)
        elif which == 3:
            _reduce_row(x3 + token * s3, w3, out + r3 * stride_site, stride_stat, BLOCK)
        elif which == 4:
            _reduce_row(x4 + token * s4, w4, out + r4 * stride_site, stride_stat, BLOCK)
        elif which == 5:
            _reduce_row(x5 + token * s5, w5, out + r5 * stride_site, stride_stat, BLOCK)
        elif which == 6:
            _reduce_row(x6 + token * s6, w6, out + r6 * stride_site, stride_stat, BLOCK)
        else:
            _reduce_row(x7 + token * s7, w7, out + r7 * stride_site, stride_stat, BLOCK)


def observe_on_gpu(tensors: list[torch.Tensor], rows: torch.Tensor, sites: list[int]) -> None:
    """`observe.reference` on the current stream, for up to 8 tensors of as many tokens."""
    padding = _MAX_TENSORS - len(tensors)
    every = [*tensors, *tensors[:1] * padding]
    num_tokens = tensors[0].shape[0]
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
        num_tokens,
        rows.stride(0),
        rows.stride(1),
        NUM=len(tensors),
        BLOCK=_BLOCK,
        num_warps=8,
    )
