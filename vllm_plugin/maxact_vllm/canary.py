"""Whether this vLLM is one we can observe: a table of everything in vLLM that is wrapped or read, and looks at it.

There are two looks. `at_registration`, in every process and before anything is patched, is at what registration
patches. `of_worker` is at a worker that is up, before it is touched: only there it is known of which classes it and its
model runner are, and importing these earlier would cost every process seconds. `by_class` shows both to a human
(``maxact doctor``).

The looks decide, never the version number: vLLM has a new minor every few weeks, and builds from source call
themselves 0.1.dev. Where all is in place an unknown version is observed, and one line says that nobody has tried.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

RUN: Final = ("0.26", "0.30", "0.31", "0.32")
"""Minors it was run with: the first on a GPU by the benchmarks, the others on a CPU by the tests (docs/versions.md)."""
READ: Final = "0.26 to 0.32"
"""Versions whose code was read for every name below."""


@dataclass(frozen=True, slots=True)
class Seam:
    """One name of vLLM's and what we rely on."""

    owner: str
    """``module:Class``, or what a worker consists of: ``worker``, ``runner``, ``batch``."""
    name: str
    kind: Literal["method", "staticmethod", "classmethod", "value"] = "method"
    takes: tuple[str, ...] | None = None
    """Arguments that come through our hands, by position or by name; None: all are passed on unread."""

    def __str__(self) -> str:
        return f"{self.owner.rpartition(':')[2]}.{self.name}"


_ENGINE_ARGS: Final = "vllm.engine.arg_utils:EngineArgs"
_CONFIG: Final = "vllm.config:VllmConfig"
_WRAPPER: Final = "vllm.v1.worker.worker_base:WorkerWrapperBase"

DOOR: Final = (
    Seam(_ENGINE_ARGS, "add_cli_args", "staticmethod", ("parser",)),
    Seam(_ENGINE_ARGS, "from_cli_args", "classmethod", ("args",)),
    Seam(_ENGINE_ARGS, "create_engine_config"),
    Seam(_ENGINE_ARGS, "additional_config", "value"),
)
"""What it takes to have flags, and to say that nothing will be observed."""

PATCHED: Final = (
    Seam(_CONFIG, "compute_hash"),
    Seam(_CONFIG, "additional_config", "value"),
    Seam(_WRAPPER, "init_device"),
)
"""What registration patches besides."""

WORKER: Final = (
    Seam("worker", "compile_or_warm_up_model"),
    Seam("worker", "shutdown"),
    Seam("runner", "load_model"),
    Seam("runner", "execute_model", takes=("scheduler_output",)),
    Seam("runner", "get_model", takes=()),
    Seam("runner", "device", "value"),
)
"""What is wrapped or read of one worker and its model runner."""

_V1_BATCH: Final = ("num_reqs", "req_ids", "num_computed_tokens_cpu", "num_prompt_tokens")
_V2_BATCH: Final = ("num_tokens", "num_scheduled_tokens", "num_computed_tokens_np", "prefill_len_np")
_V2_BATCH_CLASS: Final = "vllm.v1.worker.gpu.input_batch:InputBatch"
V1_STEP: Final = (Seam("runner", "input_batch", "value"), *(Seam("batch", name, "value") for name in _V1_BATCH))
V2_STEP: Final = (
    Seam("runner", "execute_model_state", "value"),
    *(Seam(_V2_BATCH_CLASS, name, "value") for name in _V2_BATCH),
)
"""What `compat.StepReader` reads of either runner."""

_CLASSES: Final = {
    "worker": ("vllm.v1.worker.gpu_worker:Worker", "vllm.v1.worker.cpu_worker:CPUWorker"),
    "runner": ("vllm.v1.worker.gpu_model_runner:GPUModelRunner", "vllm.v1.worker.gpu.model_runner:GPUModelRunner"),
    "batch": ("vllm.v1.worker.gpu_input_batch:InputBatch",),
}
"""Classes that `by_class` looks at; other platforms derive theirs from them."""


def at_registration() -> tuple[str, str]:
    """Why we cannot even have flags, and why we cannot observe; empty where we can."""
    door = _first_fault(DOOR)
    return door, door or _first_fault(PATCHED)


def of_worker(worker: Any) -> str:
    """Why this worker, whose device is up, cannot be observed; empty where it can."""
    runner = getattr(worker, "model_runner", None)
    if runner is None:
        return f"{type(worker).__name__}.model_runner is gone"
    if hasattr(runner, "input_batch"):
        live = {"worker": worker, "runner": runner, "batch": runner.input_batch}
        return _first_fault((*WORKER, *V1_STEP), live)
    return _first_fault((*WORKER, *V2_STEP), {"worker": worker, "runner": runner})


def by_class() -> Iterator[tuple[str, str, str]]:
    """For each class: its name, the names in it that we rely on, and the first thing wrong; empty where all is well."""
    places: dict[str, list[Seam]] = {}
    for seam in (*DOOR, *PATCHED, *WORKER, *V1_STEP, *V2_STEP):
        for place in _CLASSES.get(seam.owner, (seam.owner,)):
            if not (seam in V1_STEP and ".gpu." in place or seam in V2_STEP and "gpu_model_runner" in place):
                places.setdefault(place, []).append(seam)
    for place, seams in places.items():
        fault = _first_fault([dataclasses.replace(seam, owner=place) for seam in seams])
        yield place.replace(":", "."), ", ".join(seam.name for seam in seams), fault


def untried() -> str:
    """A sentence about a vLLM that maxact was not run with; empty for one it was."""
    from vllm import __version__ as version

    minor = re.match(r"\d+\.\d+", version)
    if minor and minor[0] in RUN:
        return ""
    return f"maxact was run on vLLM {', '.join(RUN)}, not on {version}; what it wraps is in place, so it observes"


def _first_fault(seams: Any, live: dict[str, Any] | None = None) -> str:
    return next((fault for seam in seams if (fault := _fault(seam, live or {}))), "")


def _fault(seam: Seam, live: dict[str, Any]) -> str:
    """What is wrong with one seam, on a live object or on its class."""
    owner = live.get(seam.owner)
    if owner is None:
        module, _, name = seam.owner.partition(":")
        try:
            owner = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            return f"vLLM moved {name}: {error}"
    label = f"{owner.__name__ if isinstance(owner, type) else type(owner).__name__}.{seam.name}"
    if seam.kind == "value":
        return "" if _has_value(owner, seam.name) else f"{label} is gone"
    found = inspect.getattr_static(owner, seam.name, None)
    if found is None:
        return f"{label} is gone"
    if seam.kind != "method" and type(found).__name__ != seam.kind:
        return f"{label} is no {seam.kind} any more"
    return "" if _can_call(owner, seam) else f"{label} does not take ({', '.join(seam.takes or ())}) any more"


def _has_value(owner: Any, name: str) -> bool:
    """Whether an object has an attribute, or a class declares it or names it in its code."""
    if not isinstance(owner, type):
        return hasattr(owner, name)
    for each in owner.__mro__:
        if name in vars(each) or name in vars(each).get("__annotations__", {}):
            return True
        functions = [inspect.unwrap(member) for member in vars(each).values() if inspect.isfunction(member)]
        if any(name in function.__code__.co_names for function in functions):
            return True
    return False


def _can_call(owner: Any, seam: Seam) -> bool:
    function = getattr(owner, seam.name)
    if seam.takes is None:
        return callable(function)
    bound = seam.kind == "classmethod" or not isinstance(owner, type) or seam.kind == "staticmethod"
    before = () if bound else (owner,)
    try:
        signature = inspect.signature(function)
        signature.bind(*before, *seam.takes)
        signature.bind(*before, **dict.fromkeys(seam.takes))
    except (TypeError, ValueError):
        return False
    return True
