"""Hop 2/9: hooks on the modules of the served model, traced into its own graph, that hand each site to `observe`.

A forward hook, registered after the weights are loaded and before the first forward, is traced by Dynamo like the
model's own code. A stretch of sites goes from one attention, where vLLM splits a graph, to the next: from its keys and
values to the next layer's input projection. The hooks only collect the tensors of a group of stretches; behind its last
site one operation reads them all and writes one float per token and statistic into rows that were allocated before
compilation. What becomes of the rows is decided after the step, outside the graph (`fold`), where the real tokens are
known.

On a GPU a group is one stretch, and its operation runs on a branch of the graph beside the projections and the
attention that follow. It is launched behind the first of them, or its programs would take the multiprocessors first.

On a CPU the compiled graph is whole, and calling an operation takes longer than reading a token, because weights have
driven its code out of the caches meanwhile: there a group is as many stretches as `_HELD_ELEMENTS` lets wait. Run
eagerly, where the next layer may write over what the last one made, every stretch is read at its own end.

The rows are non-persistent buffers of a hooked module, so that a compiled artefact resolves them from the live model;
each group's are a storage of their own, or functionalization would copy the whole block once per write; yet they lie in
one block of memory, so that one fold reads them all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn

from maxact_proto import stats
from maxact_vllm import observe, ops
from maxact_vllm.buffers import Buffers, own_storage
from maxact_vllm.compat import StaticScale

_AS_EXECUTED: Final = (
    *("k", "v", "o_proj_input", "attn_output", "attn_post_norm"),
    *("mlp_input", "mlp_gate", "down_proj_input", "mlp_output", "post_norm"),
    *("hidden", "final_norm", "attn_input"),
)
"""Sites from one attention to the next in the order a forward meets them."""
_HELD_ELEMENTS: Final = 1 << 26
"""Of tensors that wait for the operation of their group on a CPU, in the largest step: 128 MiB in bfloat16."""
_NEVER_WRITTEN_OVER: Final = ("mlp_gate", "v")
"""Parts of a merged projection, which nothing writes over: a copy of a part would be a real one."""

Reads = Literal["input", "second argument", "third argument", "output", "residual", "sum"]
_ARGUMENTS: Final = {"input": 0, "second argument": 1, "third argument": 2}
Keep = Callable[[torch.Tensor, str], torch.Tensor]
Pending = list[tuple[int, torch.Tensor]]
"""Sites of a group met so far in this forward: place in its buffers, tensor ``[tokens, width]``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tap:
    """Where one site is read: ``reads`` of ``module``.

    ``input``: the first tensor argument; the others as named. ``output``: the output, or the first of a tuple, or where
    nothing is returned the last argument, which such a module fills; of a wider one the first ``width`` columns.
    ``residual``: the second of a ``(normed, residual)`` tuple, or the input of a norm that was given no residual: the
    residual stream itself. ``sum``: that of the two a layer returns.
    """

    layer: int | None
    name: str
    path: str
    module: nn.Module
    reads: Reads
    width: int
    """Elements per token on this rank."""
    sharded: bool = False
    alone: bool = False
    """True where the compiler may not see the module: its hook runs when others of its group were traced long ago."""
    scale: StaticScale | None = None
    """Of the served checkpoint; None where it has none."""


def in_order(taps: Sequence[Tap]) -> list[Tap]:
    """The taps group after group, as `instrument` wants them."""
    return [tap for _, tap in sorted(zip(_positions(taps), taps, strict=True), key=lambda pair: pair[0])]


def instrument(taps: Sequence[Tap], buffers: Buffers, *, branch: bool) -> None:
    """Hook every tap so that its forward writes its part of ``buffers``; ``taps`` from `in_order`.

    ``branch``: read groups on a branch of the graph, as on a GPU; else several stretches at once.
    """
    ops.define(buffers.block.device.type)
    first = 0
    projections = {tap.layer: tap for tap in taps if branch and tap.name == "o_proj_input" and not tap.alone}
    # None in front of the first attention: a graph that branches so early waits 9 us for its branch (H200).
    branching: dict[int | None, Tap] = {}
    for stretches in _groups(taps, 0 if branch else _HELD_ELEMENTS // buffers.block.shape[2]):
        num_sites = sum(map(len, stretches))
        own = _buffers_of(slice(first, first + num_sites), buffers)
        _hook_group(stretches, own, branching, 0 if buffers.block.is_cuda else first)
        if stretches[0][-1].name == "attn_input":
            branching = projections
        first += num_sites


def _buffers_of(sites: slice, buffers: Buffers) -> dict[str, torch.Tensor]:
    """What the operation of a group is given: its sites' part of the buffers, on a CPU all of them."""
    if buffers.block.is_cuda:
        parts = (buffers.block.transpose(0, 1)[sites], buffers.histograms[sites], buffers.scales[sites])
    else:
        parts = (buffers.block.permute(2, 1, 0), buffers.histograms, buffers.scales)
    rows, histograms, scales = map(own_storage, parts)
    return {"rows": rows, "histograms": histograms, "sampling": buffers.sampling, "scales": scales}


def _positions(taps: Sequence[Tap]) -> list[tuple[int, str, int]]:
    """Sort key of each: the stretch between two attentions, the group in it, the place in the group."""
    # The final norm belongs to the last layer where it is what returns that layer's residual stream.
    layers = {id(tap.module): tap.layer for tap in taps if tap.name == "hidden"}

    def position(tap: Tap) -> tuple[int, str, int]:
        layer = layers.get(id(tap.module)) if tap.name == "final_norm" else tap.layer
        if layer is None:
            return (-2 if tap.name == "embedding" else 1 << 30), tap.name, 0
        stretch = layer - (tap.name == "attn_input")
        return (stretch, tap.name, 0) if tap.alone else (stretch, "", _AS_EXECUTED.index(tap.name))

    return [position(tap) for tap in taps]


def _groups(taps: Sequence[Tap], most: int) -> Iterator[list[list[Tap]]]:
    """Stretches that one operation reads: those that follow one another up to ``most`` elements per token, one at
    least; what the compiler may not see alone."""
    group: list[list[Tap]] = []
    held = 0
    for _, of_one in itertools.groupby(zip(_positions(taps), taps, strict=True), key=lambda pair: pair[0][:2]):
        stretch = [tap for _, tap in of_one]
        width = sum(tap.width for tap in stretch)
        if group and (held + width > most or stretch[0].alone or group[0][0].alone):
            yield group
            group, held = [], 0
        group.append(stretch)
        held += width
    yield group


def _hook_group(
    stretches: Sequence[Sequence[Tap]],
    buffers: Mapping[str, torch.Tensor],
    projections: Mapping[int | None, Tap],
    first: int,
) -> None:
    """``projections``: the output projections a branch may end behind; ``first``: where the group's sites begin in
    ``buffers``."""
    pending: Pending = []
    places = itertools.count(first)
    at_last = stretches[-1][-1]
    projection = projections.get(at_last.layer) if at_last.name == "attn_input" else None
    keep = _kept_for_a_branch() if projection else _kept_for_later if len(stretches) > 1 else None
    for stretch in stretches:
        last = stretch[-1]
        names = [f"_maxact_{last.name}_{part}" for part in buffers]
        for name, part in zip(names, buffers.values(), strict=True):
            last.module.register_buffer(name, part, persistent=False)
        for tap in stretch:
            _collect(tap, next(places), pending, at_once=tap is last, keep=keep)
        if last.reads in ("output", "residual", "sum"):
            last.module.register_forward_hook(_observing(pending, names, waits=stretch is not stretches[-1]))
        elif projection:
            # To behind the output projection and not longer: the norm that comes next may write over what it is given.
            projection.module.register_buffer("_maxact_branch", buffers["rows"], persistent=False)
            last.module.register_forward_pre_hook(_forking(pending, names[0]))
            last.module.register_forward_hook(_branching(pending, names))
            projection.module.register_forward_hook(_joining(pending))
        else:
            last.module.register_forward_pre_hook(_observing(pending, names, waits=stretch is not stretches[-1]))


def _collect(tap: Tap, index: int, pending: Pending, *, at_once: bool, keep: Keep | None) -> None:
    """``keep``: what the compiled graph does with a tensor until its group is read."""
    argument = _ARGUMENTS.get(tap.reads)
    # What a block returns, the norm behind it may write over: it is read from a copy, which Inductor finds to be none.
    copied = tap.reads == "output" and tap.name not in _NEVER_WRITTEN_OVER and not at_once

    def add(x: Any) -> None:
        if any(place == index for place, _ in pending):  # the last site of the group did not run
            pending.clear()
        if isinstance(x, torch.Tensor) and (x.ndim == 2 or x.shape[0] == 1):  # one row per token
            x = _readable(x)
            pending.append((index, keep(x, tap.name) if keep and torch.compiler.is_compiling() else x))

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (*args, *kwargs.values())[argument or 0]
        add(x.flatten(1) if argument and isinstance(x, torch.Tensor) else x)  # of one row per token and head

    def on_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = (*args, *kwargs.values())
        parts = output if isinstance(output, tuple) else (output,)
        if tap.reads == "residual":
            add(parts[1] if len(parts) > 1 else given[0])
        elif tap.reads == "sum":
            add(parts[0] + parts[1])
        else:
            x = given[-1] if output is None else parts[0]
            x = x[..., : tap.width] if x.shape[-1] > tap.width else x
            add(x.clone() if copied else x)

    if argument is not None:
        tap.module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        tap.module.register_forward_hook(on_output, with_kwargs=True)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[tokens, width]`` or ``[1, tokens, width]`` as the operations take it."""
    x = x if x.ndim == 2 else x.flatten(0, -2)
    x = x if x.dtype in observe.DTYPES else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _kept_for_later(x: torch.Tensor, name: str) -> torch.Tensor:
    """``x`` as it is now, for an operation behind many layers, as one buffer that Inductor makes here.

    What is cheap to compute, such as a sum of two streams, it would compute once more for that operation: keep and add
    up the outputs of all layers before. What is read by strides it lays down; the copy it finds to be none.
    """
    if name in _NEVER_WRITTEN_OVER:
        return x
    copy = x.clone()
    return copy.as_strided(copy.shape, copy.stride())


def _kept_for_a_branch() -> Keep:
    """The same for a branch of a CUDA graph. Where Inductor computes a tensor for each operation that reads it, it
    writes over what it gave the branch as soon as that is launched, and the branch would read what came after."""
    from torch._inductor import inductor_prims

    return lambda x, name: inductor_prims.force_stride_order(x, x.stride())


def _observing(pending: Pending, names: Sequence[str], *, waits: bool) -> Callable[..., None]:
    def hook(module: nn.Module, *_: Any) -> None:
        if waits and torch.compiler.is_compiling():
            return
        buffers = [getattr(module, name) for name in names]
        torch.ops.maxact.observe([x for _, x in pending], *buffers, [place for place, _ in pending])
        pending.clear()

    return hook


def _forking(pending: Pending, rows: str) -> Callable[..., None]:
    def hook(module: nn.Module, *_: Any) -> None:
        torch.ops.maxact.fork([x for _, x in pending], getattr(module, rows))

    return hook


def _branching(pending: Pending, names: Sequence[str]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        buffers = [getattr(module, name) for name in names]
        tensors, places = [x for _, x in pending], [place for place, _ in pending]
        torch.ops.maxact.branch(tensors, *buffers, places, _made(output))

    return hook


def _joining(pending: Pending) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        torch.ops.maxact.join([*(x for _, x in pending), *_made(output)], module._maxact_branch)
        pending.clear()

    return hook


def _made(output: Any) -> list[torch.Tensor]:
    """What a projection made: an argument of what has to come behind it, or the compiler moves that in front."""
    return [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, torch.Tensor)]


assert set(_AS_EXECUTED) <= set(stats.SITES), "groups are made of known sites"
