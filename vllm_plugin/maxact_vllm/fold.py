"""Hop 3/9: after a step, per-token rows of all sites -> running statistics per (phase, site).

Runs on the model's thread and the model's stream, outside the graph, once per step: here it is known how many rows are
real (the rest is padding of a CUDA graph) and which phase each belongs to. Nothing is allocated on the host that grows,
nothing synchronizes, no lock is taken: the flusher swaps the accumulators under a sequence counter (`Accumulators`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from maxact_proto import stats
from maxact_vllm.compat import Step

Codes = npt.NDArray[np.int8]
"""Phase of each token row, ``[num_tokens]``, an index into `stats.PHASES`."""


def phases_of(step: Step) -> int | Codes:
    """The phase of a step's rows: one number where they are all alike (every pure decode step), else one per row."""
    if (step.computed >= step.prompt_lens).all():
        return stats.DECODE
    starts = np.cumsum(step.scheduled) - step.scheduled
    position = np.arange(step.num_tokens) - np.repeat(starts - step.computed, step.scheduled)
    codes = np.where(position < np.repeat(step.prompt_lens, step.scheduled), stats.PREFILL, stats.DECODE)
    codes[position == 0] = stats.FIRST
    return codes.astype(np.int8)


class Accumulators:
    """Two sets of running statistics; the model's thread folds into one while the flusher empties the other."""

    def __init__(self, num_sites: int, device: torch.device) -> None:
        self.empty = torch.from_numpy(stats.empty(num_sites)).to(device)
        self.values = [self.empty.clone(), self.empty.clone()]
        """Per set float32 ``[num_phases, num_sites, num_stats]`` on the model's device."""
        self.tokens = [np.zeros(len(stats.PHASES), np.int64) for _ in range(2)]
        """Per set the token rows of each phase."""
        self.active = 0
        """The set that the model's thread folds into; only the flusher changes it."""
        self.folds = 0
        """Odd while a fold is being launched: after a swap the flusher waits until that fold is through."""
        self.stream: torch.cuda.Stream | None = None
        """On a GPU the stream of the last fold: the model's."""


def fold(block: torch.Tensor, num_tokens: int, phases: int | Codes, values: torch.Tensor) -> None:
    """Fold the first ``num_tokens`` rows of ``block`` into ``values``.

    ``block``: float32 ``[4, sites, tokens]``; ``values``: float32 ``[phases, sites, stats]``; both mutated. The plain
    torch form, for CPUs and as the reference of the Triton kernel. Rows of ``max`` are set back to -inf, so that a site
    which does not run in the next step adds nothing.
    """
    rows = block[:, :, :num_tokens]
    if isinstance(phases, int):
        _fold_rows(rows, values[phases])
    else:
        for phase in range(len(stats.PHASES)):
            index = np.flatnonzero(phases == phase)
            if index.size:
                _fold_rows(rows[:, :, torch.from_numpy(index).to(rows.device)], values[phase])
    rows[stats.MAX].fill_(-torch.inf)


def _fold_rows(rows: torch.Tensor, into: torch.Tensor) -> None:
    """Fold ``rows`` ``[4, sites, n]`` of one phase into ``into`` ``[sites, stats]``."""
    top, bottom = rows[stats.MAX], rows[stats.MIN]
    finite = top.isfinite() & bottom.isfinite()
    broken = (top != -torch.inf) & ~finite
    into[:, stats.MAX] = torch.maximum(into[:, stats.MAX], top.where(finite, -torch.inf).amax(-1))
    into[:, stats.MIN] = torch.minimum(into[:, stats.MIN], bottom.where(finite, torch.inf).amin(-1))
    into[:, stats.SUM_SQUARES : stats.NONFINITE] += rows[stats.SUM_SQUARES :].where(finite, 0.0).sum(-1).T
    into[:, stats.NONFINITE] += broken.sum(-1)


class Folder:
    """Folds each step of one worker. Everything here runs on the model's thread."""

    def __init__(self, block: torch.Tensor) -> None:
        self._block = block
        self.accumulators = Accumulators(block.shape[1], block.device)
        self._on_gpu = _GpuFold(block, self.accumulators) if block.device.type == "cuda" else None

    def forget(self) -> None:
        """Drop what the rows hold, so that nothing of warm-up is ever folded."""
        self._block.fill_(-torch.inf)

    def fold(self, step: Step) -> None:
        """Fold a step whose forward was launched on the current stream."""
        phases = phases_of(step)
        state = self.accumulators
        state.folds += 1
        active = state.active
        if self._on_gpu is not None:
            self._on_gpu(step.num_tokens, phases, state.values[active])
        else:
            fold(self._block, step.num_tokens, phases, state.values[active])
        if isinstance(phases, int):
            state.tokens[active][phases] += step.num_tokens
        else:
            state.tokens[active] += np.bincount(phases, minlength=len(stats.PHASES))
        state.folds += 1


class _GpuFold:
    """Launches the kernel; hands it the phases of mixed steps through a ring of pinned memory."""

    _DEPTH = 8

    def __init__(self, block: torch.Tensor, accumulators: Accumulators) -> None:
        from maxact_vllm.fold_kernel import fold_on_gpu

        self._launch = fold_on_gpu
        self._block = block
        self._accumulators = accumulators
        self._pinned = [torch.empty(block.shape[2], dtype=torch.int8, pin_memory=True) for _ in range(self._DEPTH)]
        self._copied = [torch.cuda.Event() for _ in range(self._DEPTH)]
        self._codes = torch.zeros(block.shape[2], dtype=torch.int8, device=block.device)
        self._next = 0
        # Compile both variants now: no tokens, so nothing is folded.
        self._launch(block, 0, stats.DECODE, accumulators.values[0])
        self._launch(block, 0, self._codes, accumulators.values[0])

    def __call__(self, num_tokens: int, phases: int | Codes, values: torch.Tensor) -> None:
        self._accumulators.stream = torch.cuda.current_stream(self._block.device)
        if isinstance(phases, int):
            self._launch(self._block, num_tokens, phases, values)
            return
        slot = self._next = (self._next + 1) % self._DEPTH
        self._copied[slot].synchronize()  # eight mixed steps old: long done
        self._pinned[slot][:num_tokens].numpy()[:] = phases
        self._codes[:num_tokens].copy_(self._pinned[slot][:num_tokens], non_blocking=True)
        self._copied[slot].record()
        self._launch(self._block, num_tokens, self._codes, values)
