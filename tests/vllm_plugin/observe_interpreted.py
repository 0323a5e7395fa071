"""Run as a program under ``TRITON_INTERPRET=1``: the kernel of a group of sites against the torch reference."""

from __future__ import annotations

import torch

from maxact_proto import stats
from maxact_vllm import observe_gpu
from maxact_vllm.buffers import COUNTED_ROWS, NUM_ROWS
from maxact_vllm.observe import packed, reference
from maxact_vllm.observe_gpu import observe


def check(num_tokens: int, real: int, widths: list[int], dtype: torch.dtype, num_rows: int = NUM_ROWS) -> None:
    """One group, its sites in another order than its tensors, a NaN and an infinity among the values."""
    tensors = [torch.randn(num_tokens, width + 1).to(dtype)[:, :width] for width in widths]
    tensors[0][0, 0] = torch.nan
    tensors[-1][-1, -1] = torch.inf
    rows = torch.full((len(widths) + 1, num_rows, 256), -7.0)
    scales = torch.rand(len(widths) + 1, 2)
    scales[1] = torch.tensor([torch.inf, -1.0])
    histograms = torch.ones(len(widths) + 1, stats.NUM_BINS, dtype=torch.int64)
    expected, counted = rows.clone(), histograms.clone()
    sites = list(range(len(widths), 0, -1))
    sampling = torch.tensor([packed(real, 64, 1) if real else 0])
    reference(tensors, expected, counted, sampling, scales, sites)
    observe(tensors, rows, histograms, sampling, scales, sites)
    assert torch.equal(histograms, counted)
    assert (counted.sum() > counted.numel()) == (real > 0)
    assert torch.isnan(rows[sites[0], stats.MAX, 0])
    broken = torch.isnan(expected[:, stats.MAX])
    rows[:, stats.MIN][broken] = expected[:, stats.MIN][broken] = 0
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(rows[:, : stats.NUM_EXTREMA].nan_to_num(), expected[:, : stats.NUM_EXTREMA].nan_to_num())


if __name__ == "__main__":
    torch.manual_seed(0)
    observe_gpu._BLOCK = 32  # the interpreter reduces element by element
    check(2, 2, [16, 16], torch.float32)
    check(3, 2, [64, 64, 100, 64, 300], torch.bfloat16)
    check(33, 0, [7, 64, 128, 64, 64, 64, 64, 64], torch.float16)
    check(140, 130, [7, 64], torch.bfloat16)
    check(33, 33, [7, 64, 300], torch.bfloat16, COUNTED_ROWS)
    print("kernel and reference agree")
    block = torch.zeros(1, NUM_ROWS, 64)
    unlike = [torch.zeros(1, 8), torch.zeros(2, 8)]  # in tokens
    observe(unlike, block, torch.zeros(1, 64), torch.zeros(1), torch.zeros(1, 2), [0, 0])
    print("and what cannot be launched is survived")
