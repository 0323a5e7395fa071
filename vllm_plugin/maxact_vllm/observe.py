"""Hop 2/9: what is computed of a site: max, min, sum of squares and sum of magnitudes of each token row.

Three operations that the compiler sees as a whole; all write ``rows``, float32 ``[sites of a group, NUM_ROWS, padded
tokens]``, as far as it can tell, which keeps them in the graph, in order and free of constants: all layers share one
compiled piece.

- ``observe(tensors, rows, sites)``: ``tensors[k]`` ``[tokens, width]`` is reduced into ``rows[sites[k]]``.
- ``fork``: the same on a side stream, a parallel branch of a CUDA graph; ``join`` makes the model's stream wait for it.
  The tensors are arguments of both, so their memory is not used again in between.

Left to Inductor, the reductions are fused into the kernels that make the tensors: measured, that costs a decode step
5-13 % on an H200, because row reductions make short kernels twice as long, and a CPU engine half of its start-up time
again. One kernel per group beside the next matrix product, which waits for memory, costs nothing at small batches
(docs/performance.md).
"""

from __future__ import annotations

import functools
from typing import Final

import torch

from maxact_proto import stats
from maxact_vllm import logger, observe_cpu

NUM_ROWS: Final = stats.NONFINITE
"""Statistics reduced in the graph: max, min, sum_squares, sum_abs. Non-finite rows are recognized when folding."""

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
"""What the operations take."""

_LIBRARY = torch.library.Library("maxact", "DEF")


@functools.cache
def define(device_type: str) -> None:
    """Make the operations known to torch, for ``cpu`` or ``cuda``; once per process."""
    for name, schema, on_gpu in (
        ("observe", "(Tensor[] tensors, Tensor(a!) rows, int[] sites) -> ()", _observe),
        ("fork", "(Tensor[] tensors, Tensor(a!) rows, int[] sites) -> ()", _fork),
        ("join", "(Tensor[] tensors, Tensor(a!) rows) -> ()", _join),
    ):
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, on_gpu, "CUDA")
        torch.library.register_fake(f"maxact::{name}", lambda *args: None, lib=_LIBRARY)
    if device_type == "cpu":
        try:
            observe_cpu.load()
        except observe_cpu.BuildError as error:
            logger.warning("maxact observes this CPU the slow way: %s", error)
            _LIBRARY.impl("observe", reference, "CPU")


def reference(tensors: list[torch.Tensor], rows: torch.Tensor, sites: list[int]) -> None:
    """What every kernel computes; ``rows`` is mutated. A row that holds a NaN has a NaN as its max; its min is open."""
    for x, site in zip(tensors, sites, strict=True):
        wide = x.float()
        out = rows[site, :, : x.shape[0]]
        out[stats.MAX], out[stats.MIN] = wide.amax(-1), wide.amin(-1)
        out[stats.SUM_SQUARES], out[stats.SUM_ABS] = (wide * wide).sum(-1), wide.abs().sum(-1)


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
    from maxact_vllm.observe_gpu import observe_on_gpu

    observe_on_gpu(tensors, rows, sites)
