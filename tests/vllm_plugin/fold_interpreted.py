"""Run as a program under ``TRITON_INTERPRET=1``: the Triton kernel against the torch reference, on CPU memory."""

from __future__ import annotations

import numpy as np
import torch

from maxact_proto import stats
from maxact_vllm.buffers import COUNTED_ROWS, NUM_ROWS
from maxact_vllm.fold import reference
from maxact_vllm.fold_gpu import fold

NUM_SITES, PADDED = 3, 1152


def rows(rng: np.random.Generator, num_tokens: int, num_rows: int) -> torch.Tensor:
    """Rows of a step with a NaN, an infinity, a site that did not run, and garbage in the padding."""
    block = rng.normal(size=(num_rows, NUM_SITES, PADDED)).astype(np.float32)
    block[stats.MIN] = block[stats.MAX] - 1
    block[stats.SUM_SQUARES :] = np.abs(block[stats.SUM_SQUARES :])
    block[NUM_ROWS:] = rng.integers(0, 5000, size=block[NUM_ROWS:].shape)
    block[:, :, num_tokens:] = 1e30
    if num_tokens > 2:
        block[stats.MAX, 0, 1] = np.nan
        block[stats.MIN, 0, 2] = -np.inf
        block[stats.MAX, 1, :] = -np.inf
    return torch.from_numpy(block)


def check(num_tokens: int, phases: int | np.ndarray, rng: np.random.Generator, num_rows: int = NUM_ROWS) -> None:
    """One step folded twice into the same running statistics."""
    block = rows(rng, num_tokens, num_rows)
    expected_counts = torch.zeros(len(stats.PHASES), NUM_SITES, num_rows - NUM_ROWS, dtype=torch.int64)
    counts = expected_counts.clone()
    expected_block, expected = block.clone(), torch.from_numpy(stats.empty(NUM_SITES))
    values = expected.clone()
    for _ in range(2):
        codes = torch.from_numpy(np.atleast_1d(np.int8(phases)))
        reference(expected_block, expected, expected_counts, codes, num_tokens)
        fold(block, values, counts, codes, num_tokens)
        block[stats.MAX, 2, :num_tokens] = expected_block[stats.MAX, 2, :num_tokens] = 5.0
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=0)
    assert torch.equal(values[..., : stats.NUM_EXTREMA], expected[..., : stats.NUM_EXTREMA])
    assert torch.equal(values[..., stats.NONFINITE], expected[..., stats.NONFINITE])
    assert torch.equal(counts, expected_counts)
    assert torch.equal(block, expected_block)


if __name__ == "__main__":
    generator = np.random.default_rng(0)
    for tokens in (1, 33, 512, 513, 1100):
        for phase in range(len(stats.PHASES)):
            check(tokens, phase, generator)
        mixed = generator.integers(0, len(stats.PHASES), tokens).astype(np.int8)
        check(tokens, mixed, generator)
        check(tokens, mixed, generator, COUNTED_ROWS)
    print("kernel and reference agree")
