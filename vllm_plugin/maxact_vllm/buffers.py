"""Hop 2/9: memory beside the model's: what the graph writes per step, and what says which rows to sample.

It is allocated before compilation and never moves, because CUDA graphs keep addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from maxact_proto import stats
from maxact_vllm.compat import StaticScale

NUM_ROWS: Final = stats.NONFINITE
"""Statistics reduced in the graph: max, min, sum_squares, sum_abs. Non-finite rows are recognized when folding."""
COUNTED_ROWS: Final = NUM_ROWS + len(stats.COUNTS)
"""The same with saturated and zeroed elements, of a checkpoint with static scales."""

_ALIGNMENT = 64
"""Rows start at multiples of 256 bytes. Inductor copies inputs on a GPU that are aligned to less than 16 bytes."""


@dataclass(frozen=True, slots=True)
class Buffers:
    """What the graph writes and reads beside the model's own tensors; addresses that never change."""

    block: torch.Tensor
    """One float per (statistic, site, token): float32 ``[NUM_ROWS or COUNTED_ROWS, num_sites, padded tokens]``. In
    memory on a GPU the tokens of one row lie side by side; on a CPU all that belongs to a token, or the few tokens of a
    decode step would touch a page of memory each per row."""
    histograms: torch.Tensor
    """int64 ``[num_sites, NUM_BINS]``: elements by magnitude, counted up for ever."""
    sampling: torch.Tensor
    """int64 ``[1]``: which rows of the step are counted (`observe.sampled`)."""
    scales: torch.Tensor
    """float32 ``[num_sites, 4]``: beyond which magnitude an element is saturated, and up to which it is zeroed; the
    other two are not used, they keep the sites of every group aligned."""

    @property
    def nbytes(self) -> int:
        """Memory of all of them."""
        return int(self.block.nbytes + self.histograms.nbytes)


def allocate(scales: Sequence[StaticScale | None], max_tokens: int, device: torch.device) -> Buffers:
    """Buffers of one site per scale, of steps of up to ``max_tokens`` rows; counted only where there is any scale."""
    num_sites = len(scales)
    num_rows = COUNTED_ROWS if any(scales) else NUM_ROWS
    padded = -(-max_tokens // _ALIGNMENT) * _ALIGNMENT
    if device.type == "cpu":
        rows = np.full((padded, num_sites, num_rows), -np.inf, np.float32).transpose(2, 1, 0)
    else:
        rows = np.full((num_sites, num_rows, padded), -np.inf, np.float32).transpose(1, 0, 2)
    limits = np.array(
        [(*((scale.limit, scale.zero) if scale else (np.inf, -1.0)), 0, 0) for scale in scales], np.float32
    )
    # By way of numpy: vLLM may have set a default device and dtype.
    block, histograms, sampling, ranges = (
        torch.from_numpy(each).to(device)
        for each in (rows, np.zeros((num_sites, stats.NUM_BINS), np.int64), np.zeros(1, np.int64), limits)
    )
    return Buffers(block, histograms, sampling, ranges)


def own_storage(part: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous ``part`` behind a storage that nothing else shares, as far as autograd can tell."""
    if part.device.type == "cpu":
        return torch.from_numpy(part.numpy())
    return torch.as_tensor(_CudaMemory(part), device=part.device)


class _CudaMemory:
    """Keeps ``part`` alive and shows its memory to `torch.as_tensor`."""

    def __init__(self, part: torch.Tensor) -> None:
        self.part = part
        self.__cuda_array_interface__ = {
            "shape": tuple(part.shape),
            "typestr": "<f4" if part.dtype == torch.float32 else "<i8",
            "data": (part.data_ptr(), False),
            "version": 2,
        }
