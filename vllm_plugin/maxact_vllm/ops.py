"""Hops 2/9 and 3/9: the operations ``maxact::observe``, ``fork``, ``branch``, ``join`` and ``fold``, and what runs them
where.

torch and Inductor know an operation by its schema; each device has its own kernel for it: Triton on a GPU, C++ on a
CPU, plain torch where that cannot be built. On a GPU `fold` launches its own without an operation.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from torch import library

from maxact_vllm import fold, kernels_cpu, logger, observe

_OBSERVE: Final = (
    "(Tensor[] tensors, Tensor(a!) rows, Tensor(b!) histograms, Tensor sampling, Tensor scales, int[] sites) -> ()"
)
_BRANCH: Final = _OBSERVE.replace(") -> ()", ", Tensor[] behind) -> ()")
_END: Final = "(Tensor[] tensors, Tensor(a!) rows) -> ()"
_FOLD: Final = "(Tensor(a!) block, Tensor(b!) values, Tensor(c!) counts, Tensor phases, int num_tokens) -> ()"
_LIBRARY: Final = library.Library("maxact", "DEF")


@functools.cache
def define(device_type: str) -> None:
    """Make the operations known to torch, for ``cpu`` or ``cuda``; once per process."""
    schemas = {"observe": _OBSERVE, "fork": _END, "branch": _BRANCH, "join": _END, "fold": _FOLD}
    for name, schema in schemas.items():
        _LIBRARY.define(name + schema)
        library.register_fake(f"maxact::{name}", lambda *args: None, lib=_LIBRARY)
    (_define_on_cpu if device_type == "cpu" else _define_on_gpu)()


def _define_on_cpu() -> None:
    try:
        kernels_cpu.load()
    except kernels_cpu.BuildError as error:
        logger.warning("maxact observes this CPU the slow way: %s", error)
        _LIBRARY.impl("observe", _observe_on_cpu, "CPU")
        _LIBRARY.impl("fold", fold.reference, "CPU")


def _observe_on_cpu(tensors: list[torch.Tensor], rows: torch.Tensor, *others: Any) -> None:
    observe.reference(tensors, rows.permute(1, 2, 0), *others)


def _define_on_gpu() -> None:
    from maxact_vllm import observe_gpu

    for kernel in (observe_gpu.observe, observe_gpu.fork, observe_gpu.branch, observe_gpu.join):
        _LIBRARY.impl(kernel.__name__, kernel, "CUDA")
