"""Run as a program under ``TRITON_INTERPRET=1``: the kernel of a group of sites against the torch reference."""

from __future__ import annotations

import torch

from maxact_proto import stats
from maxact_vllm.observe import NUM_ROWS, reference
from maxact_vllm.observe_gpu import observe_on_gpu


def check(num_tokens: int, widths: list[int], dtype: torch.dtype) -> None:
    """One group, its sites in another order than its tensors, a NaN and an infinity among the values."""
    tensors = [torch.randn(num_tokens, width + 1).to(dtype)[:, :width] for width in widths]
    tensors[0][0, 0] = torch.nan
    tensors[-1][-1, -1] = torch.inf
    rows = torch.full((len(widths) + 1, NUM_ROWS, 64), -7.0)
    expected = rows.clone()
    sites = list(range(len(widths), 0, -1))
    reference(tensors, expected, sites)
    observe_on_gpu(tensors, rows, sites)
    assert torch.isnan(rows[sites[0], stats.MAX, 0])
    broken = torch.isnan(expected[:, stats.MAX])
    rows[:, stats.MIN][broken] = expected[:, stats.MIN][broken] = 0
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(rows[:, : stats.NUM_EXTREMA].nan_to_num(), expected[:, : stats.NUM_EXTREMA].nan_to_num())


if __name__ == "__main__":
    torch.manual_seed(0)
    check(1, [16], torch.float32)
    check(3, [64, 64, 100, 64, 4100], torch.bfloat16)
    check(33, [7, 64, 128, 64, 64, 64, 64, 64], torch.float16)
    print("kernel and reference agree")
