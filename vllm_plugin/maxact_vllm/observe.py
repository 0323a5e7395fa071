"""Hop 2/9: what is computed of a site: max, min, sum of squares and sum of magnitudes of each token row; of a sample
of the rows a histogram of magnitudes too; under a static scale how many elements it saturates and zeroes.

Four operations (`ops`) that the compiler sees as a whole:

- ``observe(tensors, rows, histograms, sampling, scales, sites)``: ``tensors[k]`` ``[tokens, width]`` is reduced into
  ``rows[sites[k]]`` and counted in ``histograms[sites[k]]``.
- ``branch``: the same on a side stream, a parallel branch of a CUDA graph. It begins where ``fork(tensors, rows)``
  stands, and is launched when ``behind`` was: of two kernels that could start at once, the GPU starts the one that was
  launched first. ``join(tensors, rows)`` makes the model's stream wait for it. The tensors are arguments of all three,
  so their memory is not used again in between.

``rows``: float32 ``[sites, NUM_ROWS or COUNTED_ROWS, padded tokens]``; on a CPU ``[padded tokens, sites, rows]``, as it
lies in memory: Inductor would copy what is not contiguous. All operations write it, as far as the compiler can tell,
which keeps them in the graph, in order and free of constants. ``scales``: float32 ``[sites, 4]``, of `Buffers`; read
where there are rows for the counts. ``histograms``: int64 ``[sites, NUM_BINS]``, counted up for ever. The sites are
those of a group on a GPU, where all layers share one compiled piece, and all on a CPU. ``sampling``: int64 ``[1]``, of
`packed`; 0 counts none.

Left to Inductor, the reductions are fused into the kernels that make the tensors: measured, that costs a decode step
5-13 % on an H200, because row reductions make short kernels twice as long, and a CPU engine half of its start-up time
again. One kernel per group beside the attention that follows, which leaves multiprocessors free, costs least
(docs/performance.md).
"""

from __future__ import annotations

import random
from typing import Final

import torch

from maxact_proto import stats
from maxact_vllm.buffers import NUM_ROWS

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
"""What the operations take."""

SAMPLING_BITS: Final = 21
"""Of each of the three parts of ``sampling``; ``kernels.cpp`` unpacks them too."""
MOST_ROWS: Final = 4
"""How many rows of one step are counted at most."""
DECODE_STEPS: Final = 8
"""Of how many decode steps one counts a row at most."""


def packed(num_tokens: int, every: int, offset: int) -> int:
    """``sampling``: of the first ``num_tokens`` rows one in ``every``, from ``offset`` on, each weighs ``every``.

    A GPU counts the first `MOST_ROWS` of them: `sampled` asks for no more.
    """
    return num_tokens << 2 * SAMPLING_BITS | every << SAMPLING_BITS | offset


def sampled(num_tokens: int, num_requests: int, draws: random.Random) -> int:
    """``sampling`` of a step of ``num_tokens`` rows: each row has a chance of one in `SAMPLE_EVERY`, in a large step
    less, and weighs one over its chance, so the counts expect those of all rows. 0 where no row is counted.

    Counting a row takes many times as long as reducing it, and in a step of one row per request, a decode step,
    everything waits for it: there are hundreds of those a second, so of those one in `DECODE_STEPS` at most has a row
    to count. No step has more than `MOST_ROWS`.
    """
    most = num_tokens * DECODE_STEPS if num_tokens == num_requests else -(-num_tokens // MOST_ROWS)
    every = max(stats.SAMPLE_EVERY, most)
    offset = draws.randrange(every)
    return packed(num_tokens, every, offset) if offset < num_tokens else 0


def reference(
    tensors: list[torch.Tensor],
    rows: torch.Tensor,
    histograms: torch.Tensor,
    sampling: torch.Tensor,
    scales: torch.Tensor,
    sites: list[int],
) -> None:
    """What every kernel computes; ``rows`` and ``histograms`` are mutated.

    A row that holds a NaN has a NaN as its max; its min is open. Only rows of finite values are counted.
    """
    rest, offset = divmod(int(sampling), 1 << SAMPLING_BITS)
    num_tokens, every = divmod(rest, 1 << SAMPLING_BITS)
    for x, site in zip(tensors, sites, strict=True):
        wide = x.float()
        out = rows[site, :, : x.shape[0]]
        out[stats.MAX], out[stats.MIN] = wide.amax(-1), wide.amin(-1)
        out[stats.SUM_SQUARES], out[stats.SUM_ABS] = (wide * wide).sum(-1), wide.abs().sum(-1)
        if len(out) > NUM_ROWS:
            limit, zero = scales[site, :2]
            out[NUM_ROWS + stats.SATURATED] = (wide.abs() > limit).sum(-1)
            out[NUM_ROWS + stats.ZEROED] = (wide.abs() <= zero).sum(-1)
        counted = wide[offset : num_tokens : max(every, 1)]
        counted = counted[counted.isfinite().all(-1)]
        bins = (counted.abs().view(torch.int32) >> 22) - 2 * (127 + stats.LOWEST_OCTAVE)
        counts = torch.bincount(bins.clamp(0, stats.NUM_BINS - 1).flatten(), minlength=stats.NUM_BINS)
        histograms[site] += counts * every
