"""Hop 3/9: after a step, per-token rows of all sites -> running statistics per (phase, site).

Runs on the model's thread and the model's stream, outside the graph, once per step: here it is known how many rows are
real (the rest is padding of a CUDA graph) and which phase each belongs to. Nothing is allocated on the host that grows,
nothing synchronizes, no lock is taken: the flusher swaps the accumulators under a sequence counter (`Accumulators`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from maxact_proto import stats
from maxact_vllm.buffers import NUM_ROWS, Buffers
from maxact_vllm.compat import Step
from maxact_vllm.observe import sampled

Codes = npt.NDArray[np.int8]
"""Phase of each token row, an index into `stats.PHASES`: ``[num_tokens]``, or ``[1]`` for all."""
_DECODE: Final = np.array([stats.DECODE], np.int8)


def phases_of(step: Step) -> Codes:
    """The phases of a step's rows; ``[1]`` where they are all alike, as in every pure decode step."""
    scheduled, computed, prompt_lens = step.requests()
    if (computed >= prompt_lens).all():
        return _DECODE
    starts = np.cumsum(scheduled) - scheduled
    position = np.arange(step.num_tokens) - np.repeat(starts - computed, scheduled)
    codes = np.where(position < np.repeat(prompt_lens, scheduled), stats.PREFILL, stats.DECODE)
    codes[position == 0] = stats.FIRST
    return codes.astype(np.int8)


class Accumulators:
    """Two sets of running statistics; the model's thread folds into one while the flusher empties the other."""

    def __init__(self, num_sites: int, device: torch.device, num_counts: int = 0) -> None:
        self.empty = torch.from_numpy(stats.empty(num_sites)).to(device)
        self.values = [self.empty.clone(), self.empty.clone()]
        """Per set float32 ``[num_phases, num_sites, num_stats]`` on the model's device."""
        self.counts = [torch.zeros(*self.empty.shape[:2], num_counts, dtype=torch.int64).to(device) for _ in range(2)]
        """Per set int64 ``[num_phases, num_sites, num_counts]``, of `stats.COUNTS` or of none."""
        self.tokens = [[0] * len(stats.PHASES) for _ in range(2)]
        """Per set the token rows of each phase."""
        self.cached = [0, 0]
        """Per set the tokens that were taken from the prefix cache, so never were rows."""
        self.active = 0
        """The set that the model's thread folds into; only the flusher changes it."""
        self.folds = 0
        """Odd while a fold is being launched: after a swap the flusher waits until that fold is through."""
        self.stream: torch.cuda.Stream | None = None
        """On a GPU the stream of the last fold: the model's."""


def reference(
    block: torch.Tensor, values: torch.Tensor, counts: torch.Tensor, phases: torch.Tensor, num_tokens: int
) -> None:
    """Fold the first ``num_tokens`` rows of ``block`` into ``values`` and ``counts``: what the kernels
    of both devices compute.

    ``block``: float32 ``[NUM_ROWS or COUNTED_ROWS, sites, tokens]``; ``values``: float32 ``[phases, sites, stats]``;
    ``counts``: int64 ``[phases, sites, counts]``; all mutated. ``phases``: int8 ``[num_tokens]``, or ``[1]`` for all.
    Rows of ``max`` are set back to -inf, so that a site which does not run in the next step adds nothing.
    """
    rows = block[:, :, :num_tokens]
    for phase in range(len(stats.PHASES)):
        _fold_rows(rows[:, :, (phases == phase).expand(num_tokens)], values[phase], counts[phase])
    rows[stats.MAX].fill_(-torch.inf)


def _fold_rows(rows: torch.Tensor, into: torch.Tensor, counts: torch.Tensor) -> None:
    """Fold ``rows`` ``[.., sites, n]`` of one phase into ``into`` ``[sites, stats]`` and ``counts``."""
    if not rows.shape[-1]:
        return
    top, bottom = rows[stats.MAX], rows[stats.MIN]
    finite = top.isfinite() & bottom.isfinite()
    broken = (top != -torch.inf) & ~finite
    into[:, stats.MAX] = torch.maximum(into[:, stats.MAX], top.where(finite, -torch.inf).amax(-1))
    into[:, stats.MIN] = torch.minimum(into[:, stats.MIN], bottom.where(finite, torch.inf).amin(-1))
    into[:, stats.SUM_SQUARES : stats.NONFINITE] += rows[stats.SUM_SQUARES : NUM_ROWS].where(finite, 0.0).sum(-1).T
    into[:, stats.NONFINITE] += broken.sum(-1)
    counts += rows[NUM_ROWS:].where(finite, 0.0).to(torch.int64).sum(-1).T


class Folder:
    """Folds each step of one worker. Everything here runs on the model's thread."""

    def __init__(self, buffers: Buffers) -> None:
        self._block = block = buffers.block
        self._sampling = buffers.sampling
        self._draws = random.Random(0)
        self._chosen = 0
        self._decoding = False
        self.accumulators = Accumulators(block.shape[1], block.device, block.shape[0] - NUM_ROWS)
        self._decode = torch.from_numpy(_DECODE).to(block.device)
        self._upload = _Upload(block.shape[2], block.device) if block.is_cuda else torch.from_numpy
        self._fold = _kernel(block.device)
        # Compile both variants now: no tokens, so nothing is folded.
        for phases in (self._decode, self._decode.expand(2)):
            self._fold(block, self.accumulators.values[0], self.accumulators.counts[0], phases, 0)

    def forget(self) -> None:
        """Drop what the rows hold, so that nothing of warm-up is ever folded."""
        self._block.fill_(-torch.inf)

    def sample(self, num_tokens: int, num_requests: int) -> None:
        """Choose the rows of the step that comes whose magnitudes are counted."""
        self._choose(sampled(num_tokens, num_requests, self._draws))

    def _choose(self, sampling: int) -> None:
        if sampling != self._chosen:
            self._sampling.fill_(sampling)
            self._chosen = sampling

    def fold(self, step: Step) -> None:
        """Fold a step whose forward was launched on the current stream."""
        self._choose(0)  # forwards that are no steps count nothing
        # Where the requests of a pure decode step go on, no position needs to be looked at.
        codes = _DECODE if step.continues and self._decoding else phases_of(step)
        self._decoding = codes is _DECODE
        state = self.accumulators
        state.folds += 1
        active = state.active
        if self._block.is_cuda:
            state.stream = torch.cuda.current_stream(self._block.device)
        phases = self._decode if codes is _DECODE else self._upload(codes)
        self._fold(self._block, state.values[active], state.counts[active], phases, step.num_tokens)
        state.cached[active] += step.cached
        tokens = state.tokens[active]
        if codes is _DECODE:
            tokens[stats.DECODE] += step.num_tokens
        else:
            for phase, count in enumerate(np.bincount(codes).tolist()):
                tokens[phase] += count
        state.folds += 1


def _kernel(device: torch.device) -> Callable[..., None]:
    """What computes `reference` there."""
    if device.type == "cpu":
        fold: Callable[..., None] = torch.ops.maxact.fold.default
        return fold
    from maxact_vllm import fold_gpu

    return fold_gpu.fold  # past torch's dispatcher, which would hold the model's thread up for longer


class _Upload:
    """Brings the phases of mixed steps to a GPU through a ring of pinned memory."""

    _DEPTH = 8

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self._pinned = [torch.empty(max_tokens, dtype=torch.int8, pin_memory=True) for _ in range(self._DEPTH)]
        self._copied = [torch.cuda.Event() for _ in range(self._DEPTH)]
        self._codes = torch.zeros(max_tokens, dtype=torch.int8, device=device)
        self._next = 0

    def __call__(self, codes: Codes) -> torch.Tensor:
        slot = self._next = (self._next + 1) % self._DEPTH
        self._copied[slot].synchronize()  # eight mixed steps old: long done
        self._pinned[slot][: len(codes)].numpy()[:] = codes
        on_device = self._codes[: len(codes)]
        on_device.copy_(self._pinned[slot][: len(codes)], non_blocking=True)
        self._copied[slot].record()
        return on_device
