"""Hop 2/9 on a GPU: all sites of a layer in one kernel, on a branch beside the matrix product that follows.

What Inductor fuses into its kernels costs a decode step 5-13 % on an H200 (Qwen3-8B's shape): row reductions make
short kernels twice as long. One kernel per layer on a parallel branch of the CUDA graph costs nothing at small batches,
where the matrix product beside it waits for memory (`benchmarks/gpu_forms.py`, docs/performance.md).

Sites are grouped by what lies between two attentions, which is also where vLLM splits a graph: output projection to
the next layer's input projection. Hooks only collect the tensors of a group; at its last site `fork` launches the
kernel on the side stream, and behind that linear layer `join` makes the model's stream wait for it. The tensors are
arguments of both, so their memory is not used again in between. Both write ``rows``, as far as the compiler can tell,
which keeps them in the graph, in order, and free of constants: all layers share one compiled piece.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from maxact_proto import stats
from maxact_vllm.instrument import NUM_ROWS, Tap, first_tensor, own_storage, pick_output

_LIBRARY = torch.library.Library("maxact", "DEF")


def instrument(taps: Sequence[Tap], block: torch.Tensor) -> None:
    """Hook every tap; ``taps`` in execution order, ``block`` from `instrument.allocate` for as many sites."""
    _define_ops()
    first = 0
    for _, group in itertools.groupby(taps, key=group_of):
        members = list(group)
        rows = own_storage(block.transpose(0, 1)[first : first + len(members)])
        first += len(members)
        _hook_group(members, rows)


def group_of(tap: Tap) -> int:
    """Number of the stretch between two attentions that a site lies in: -1 before all, i behind layer i's attention."""
    if tap.layer is None:
        return -1 if tap.name == "embedding" else 1 << 30
    return tap.layer - 1 if tap.name == "attn_input" else tap.layer


def _hook_group(taps: list[Tap], rows: torch.Tensor) -> None:
    last = taps[-1]
    buffer = f"_maxact_rows_{last.name}"
    last.module.register_buffer(buffer, rows, persistent=False)
    pending: list[tuple[int, torch.Tensor]] = []
    for index, tap in enumerate(taps):
        _collect(tap, index, pending, len(taps))
    if last.reads == "input":
        last.module.register_forward_pre_hook(_forking(pending, buffer))
        last.module.register_forward_hook(_joining(pending, buffer))
    else:
        last.module.register_forward_hook(_observing(pending, buffer))


def _collect(tap: Tap, index: int, pending: list[tuple[int, torch.Tensor]], limit: int) -> None:
    def keep(x: Any) -> None:
        if len(pending) >= limit:  # the last site of the group did not run
            pending.clear()
        if isinstance(x, torch.Tensor):
            pending.append((index, x if x.ndim == 2 else x.flatten(0, -2)))

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(first_tensor(args, kwargs))

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(pick_output(tap.reads, args, output))

    if tap.reads == "input":
        tap.module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        tap.module.register_forward_hook(on_output)


def _forking(pending: list[tuple[int, torch.Tensor]], buffer: str) -> Any:
    def fork(module: nn.Module, args: tuple[Any, ...]) -> None:
        torch.ops.maxact.fork([x for _, x in pending], getattr(module, buffer), [site for site, _ in pending])

    return fork


def _joining(pending: list[tuple[int, torch.Tensor]], buffer: str) -> Any:
    def join(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # The product is an argument so that the join comes behind it.
        torch.ops.maxact.join([*(x for _, x in pending), pick_output("output", args, output)], getattr(module, buffer))
        pending.clear()

    return join


def _observing(pending: list[tuple[int, torch.Tensor]], buffer: str) -> Any:
    def observe(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        torch.ops.maxact.observe([x for _, x in pending], getattr(module, buffer), [site for site, _ in pending])
        pending.clear()

    return observe


@functools.cache
def _define_ops() -> None:
    """`fork`, `join` and `observe`; all write ``rows`` float32 ``[sites of the group, NUM_ROWS, padded tokens]``."""
    for name, schema, run in (
        ("fork", "(Tensor[] tensors, Tensor(a!) rows, int[] sites) -> ()", _fork),
        ("join", "(Tensor[] tensors, Tensor(a!) rows) -> ()", _join),
        ("observe", "(Tensor[] tensors, Tensor(a!) rows, int[] sites) -> ()", _observe),
    ):
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, run, "CUDA")
        torch.library.register_fake(f"maxact::{name}", lambda *args: None, lib=_LIBRARY)
    _LIBRARY.impl("fork", observe_reference, "CPU")
    _LIBRARY.impl("join", lambda tensors, rows: None, "CPU")
    _LIBRARY.impl("observe", observe_reference, "CPU")


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _fork(tensors: list[torch.Tensor], rows: torch.Tensor, sites: list[int]) -> None:
    side = _side_stream(rows.device)
    side.wait_stream(torch.cuda.current_stream(rows.device))
    with torch.cuda.stream(side):
        _observe(tensors, rows, sites)


def _join(tensors: list[torch.Tensor], rows: torch.Tensor) -> None:
    torch.cuda.current_stream(rows.device).wait_stream(_side_stream(rows.device))


def _observe(tensors: list[torch.Tensor], rows: torch.Tensor, sites: list[int]) -> None:
    from maxact_vllm.branch_kernel import observe_on_gpu

    observe_on_gpu(tensors, rows, sites)


def observe_reference(tensors: list[torch.Tensor], rows: torch.Tensor, sites: list[int]) -> None:
    """What the kernel computes: the statistics of each ``tensors[k]`` ``[tokens, width]`` into ``rows[sites[k]]``."""
    for x, site in zip(tensors, sites, strict=True):
        wide = x.float()
        out = rows[site, :, : x.shape[0]]
        out[stats.MAX], out[stats.MIN] = wide.amax(-1), wide.amin(-1)
        out[stats.SUM_SQUARES], out[stats.SUM_ABS] = (wide * wide).sum(-1), wide.abs().sum(-1)


assert NUM_ROWS == 4, "observe_reference and the kernel write exactly these"
