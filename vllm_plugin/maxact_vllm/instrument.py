"""Hop 2/9: one small reduction per site and statistic, compiled into the served model's own graph.

A forward hook, registered after the weights are loaded and before the first forward, is traced by Dynamo like the
model's own code. It reduces a site along the hidden dimension only, to one float per token and statistic, and copies
these into rows that were allocated before compilation: Inductor fuses the reductions into the kernel that makes or
reads the tensor, and CUDA graphs capture the same addresses. What becomes of the rows is decided after the step,
outside the graph (`fold`), where the real tokens are known.

Two things about the rows are load-bearing. They are non-persistent buffers of the hooked module, so a compiled artefact
resolves them from the live model instead of baking in copies. And each is a storage of its own, or functionalization
would copy the whole block once per write (six times slower on a small model); yet they lie in one block of memory, so
that one fold reads them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from maxact_proto import stats

NUM_ROWS = stats.NONFINITE
"""Statistics reduced in the graph: max, min, sum_squares, sum_abs. Non-finite rows are recognized when folding."""

_ALIGNMENT = 64
"""Rows start at multiples of 256 bytes: Inductor copies inputs that are aligned to less than 16 bytes."""


Reads = Literal["input", "output", "residual"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tap:
    """Where one site is read: ``reads`` of ``module``.

    ``input``: the first tensor argument. ``output``: the output, or the first of a tuple. ``residual``: the second of
    a ``(normed, residual)`` tuple, or the input of a norm that was given no residual: the residual stream itself.
    """

    layer: int | None
    name: str
    path: str
    module: nn.Module
    reads: Reads
    width: int
    """Elements per token on this rank."""
    sharded: bool = False


def allocate(num_sites: int, max_tokens: int, device: torch.device) -> torch.Tensor:
    """The block that takes one float per (statistic, site, token): float32 ``[NUM_ROWS, num_sites, padded tokens]``.

    In memory the rows of one site, and the sites of one layer, lie side by side.
    """
    padded = -(-max_tokens // _ALIGNMENT) * _ALIGNMENT
    if device.type == "cpu":
        sites = torch.from_numpy(np.full((num_sites, NUM_ROWS, padded), -np.inf, np.float32))
    else:
        sites = torch.full((num_sites, NUM_ROWS, padded), -torch.inf, dtype=torch.float32, device=device)
    return sites.transpose(0, 1)


def execution_order(tap: Tap) -> tuple[int, int]:
    """Sort key: as a forward meets the sites, layer by layer."""
    if tap.layer is None:
        return (-1, 0) if tap.name == "embedding" else (1 << 30, 0)
    return tap.layer + (tap.name == "hidden"), -1 if tap.name == "hidden" else list(stats.SITES).index(tap.name)


def instrument(taps: Sequence[Tap], block: torch.Tensor) -> None:
    """Hook every tap so that its forward writes its rows of ``block`` (from `allocate`), site by site in order."""
    for site, tap in enumerate(taps):
        names = [f"_maxact_{tap.name}_{stat.name}" for stat in stats.STATS[:NUM_ROWS]]
        for row, name in enumerate(names):
            tap.module.register_buffer(name, own_storage(block[row, site]), persistent=False)
        _hook(tap, names)


def own_storage(row: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous ``row`` behind a storage that nothing else shares, as far as autograd can tell."""
    if row.device.type == "cpu":
        return torch.from_numpy(row.numpy())
    return torch.as_tensor(_CudaMemory(row), device=row.device)


class _CudaMemory:
    """Keeps ``row`` alive and shows its memory to `torch.as_tensor`."""

    def __init__(self, row: torch.Tensor) -> None:
        self.row = row
        self.__cuda_array_interface__ = {
            "shape": tuple(row.shape),
            "typestr": "<f4",
            "data": (row.data_ptr(), False),
            "version": 2,
        }


def _hook(tap: Tap, names: list[str]) -> None:
    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _observe(module, names, first_tensor(args, kwargs))

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _observe(module, names, pick_output(tap.reads, args, output))

    if tap.reads == "input":
        tap.module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        tap.module.register_forward_hook(on_output)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an ``input`` tap reads."""
    return args[0] if args else next(iter(kwargs.values()))


def pick_output(reads: Reads, args: tuple[Any, ...], output: Any) -> Any:
    """What an ``output`` or ``residual`` tap reads, given a module's arguments and output."""
    if reads == "output":
        return output[0] if isinstance(output, tuple) else output
    return output[1] if isinstance(output, tuple) else args[0]


def _observe(module: nn.Module, names: list[str], x: Any) -> None:
    """Write the statistics of ``x`` ``[..., tokens, width]``, any float dtype, to the first rows of four buffers."""
    if not isinstance(x, torch.Tensor):
        return
    if x.ndim != 2:
        x = x.flatten(0, -2)
    num_tokens = x.shape[0]
    wide = x.float()
    for name, reduced in zip(names, (x.amax(-1), x.amin(-1), (wide * wide).sum(-1), wide.abs().sum(-1)), strict=True):
        getattr(module, name)[:num_tokens].copy_(reduced)
