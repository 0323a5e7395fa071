"""Hop 3/9 on a GPU: `fold.reference` as one Triton kernel, one program per site.

Launched once per step on the model's stream. A program owns its site, so accumulating needs no atomics: steps are
ordered by the stream. Padded rows are never loaded.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from maxact_proto import stats

_BLOCK = 512
_compiled: dict[tuple[Any, ...], Any] = {}
"""Kernels by all that Triton specialized them on, as in `observe_gpu`: its own look at every argument holds the model's
thread up for longer than the rest of a fold."""


@triton.jit(do_not_specialize=["num_tokens"])  # type: ignore[untyped-decorator, unused-ignore]
def _fold_counts(  # type: ignore[no-untyped-def]
    rows, codes_ptr, counted, phase, num_tokens, stride_stat, UNIFORM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    saturated = tl.full([], 0, tl.int64)
    zeroed = tl.full([], 0, tl.int64)
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        here = token < num_tokens
        if not UNIFORM:
            here = here & (tl.load(codes_ptr + token, mask=here, other=-1) == phase)
        high = tl.load(rows + token, mask=here, other=float("inf"))
        low = tl.load(rows + stride_stat + token, mask=here, other=float("inf"))
        finite = here & (tl.abs(high) < float("inf")) & (tl.abs(low) < float("inf"))
        saturated += tl.sum(tl.load(rows + 4 * stride_stat + token, mask=finite, other=0.0).to(tl.int64), axis=0)
        zeroed += tl.sum(tl.load(rows + 5 * stride_stat + token, mask=finite, other=0.0).to(tl.int64), axis=0)
    tl.store(counted, tl.load(counted) + saturated)
    tl.store(counted + 1, tl.load(counted + 1) + zeroed)


# Without this every new divisibility of an integer would compile the kernel once more, in the middle of serving.
@triton.jit(do_not_specialize=["num_tokens"])  # type: ignore[untyped-decorator, unused-ignore]
def _fold_kernel(  # type: ignore[no-untyped-def]
    block_ptr,  # float32 [4 or 6, sites, padded]: max, min, sum_squares, sum_abs and counts; max is reset to -inf
    codes_ptr,  # int8 [num_tokens]: phase of each token; where UNIFORM int8 [1]: of all
    values_ptr,  # float32 [phases, sites, 5], mutated
    counts_ptr,  # int64 [phases, sites, COUNTS], mutated
    num_tokens,
    stride_stat,
    stride_site,
    num_sites,
    UNIFORM: tl.constexpr,
    COUNTS: tl.constexpr,
    PHASES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    site = tl.program_id(0)
    rows = block_ptr + site.to(tl.int64) * stride_site
    phase_first = 0
    phase_last = PHASES
    if UNIFORM:
        phase_first = tl.load(codes_ptr).to(tl.int32)
        phase_last = phase_first + 1
    for phase in range(phase_first, phase_last):
        if COUNTS:
            counted = counts_ptr + (phase * num_sites + site) * COUNTS
            _fold_counts(rows, codes_ptr, counted, phase, num_tokens, stride_stat, UNIFORM, BLOCK)
        into = values_ptr + (phase * num_sites + site) * 5
        top = tl.load(into)
        bottom = tl.load(into + 1)
        squares = tl.load(into + 2)
        magnitudes = tl.load(into + 3)
        broken = tl.load(into + 4)
        for start in range(0, num_tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            here = token < num_tokens
            if not UNIFORM:
                here = here & (tl.load(codes_ptr + token, mask=here, other=-1) == phase)
            high = tl.load(rows + token, mask=here, other=float("-inf"))
            low = tl.load(rows + stride_stat + token, mask=here, other=float("inf"))
            # Comparisons with a NaN are false, so this is "finite" without a library call.
            finite = here & (tl.abs(high) < float("inf")) & (tl.abs(low) < float("inf"))
            ran = here & (high != float("-inf"))
            square = tl.load(rows + 2 * stride_stat + token, mask=finite, other=0.0)
            magnitude = tl.load(rows + 3 * stride_stat + token, mask=finite, other=0.0)
            top = tl.maximum(top, tl.max(tl.where(finite, high, float("-inf")), axis=0))
            bottom = tl.minimum(bottom, tl.min(tl.where(finite, low, float("inf")), axis=0))
            squares += tl.sum(square, axis=0)
            magnitudes += tl.sum(magnitude, axis=0)
            broken += tl.sum((ran & ~finite).to(tl.float32), axis=0)
            tl.store(rows + token, tl.full([BLOCK], float("-inf"), tl.float32), mask=here)
        tl.store(into, top)
        tl.store(into + 1, bottom)
        tl.store(into + 2, squares)
        tl.store(into + 3, magnitudes)
        tl.store(into + 4, broken)


def fold(
    block: torch.Tensor, values: torch.Tensor, counts: torch.Tensor, phases: torch.Tensor, num_tokens: int
) -> None:
    """`fold.reference` on the current stream; all tensors on the device."""
    num_sites = block.shape[1]
    tensors = (block, phases, values, counts)
    numbers = (num_tokens, block.stride(0), block.stride(1), num_sites)
    constants = (phases.shape[0] == 1, counts.shape[-1], len(stats.PHASES), _BLOCK)
    kind = (numbers[1:], constants, tuple(x.data_ptr() % 16 == 0 for x in tensors))
    compiled = _compiled.get(kind)
    if compiled:
        stream = torch.cuda.current_stream(block.device).cuda_stream
        compiled[num_sites, 1, 1](*tensors, *numbers, *constants, stream=stream)
    else:
        _compiled[kind] = _fold_kernel[(num_sites,)](*tensors, *numbers, *constants, num_warps=4)
