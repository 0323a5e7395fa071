"""vLLMs that are not as maxact knows them: changes to the real one, made in a process of its own before it is used.

Run as a program: what the canary says of each of them, as JSON; each is made in a process forked for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Change:
    """What is changed, and what maxact is to say about it."""

    make: Callable[[], None]
    said: str


def _engine_args() -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs


def _config() -> Any:
    from vllm.config import VllmConfig

    return VllmConfig


def _runner() -> Any:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    return GPUModelRunner


def _gone(owner: Callable[[], Any], name: str) -> Callable[[], None]:
    return lambda: delattr(owner(), name)


def _flags_into_an_instance() -> None:
    engine_args = _engine_args()
    made = engine_args.from_cli_args.__func__
    engine_args.from_cli_args = lambda self, args: made(type(self), args)


def _parser_comes_with_a_group() -> None:
    engine_args = _engine_args()
    add = engine_args.add_cli_args
    engine_args.add_cli_args = staticmethod(lambda parser, group: add(parser))


def _another_name_for_what_is_scheduled() -> None:
    runner = _runner()
    execute_model = runner.execute_model

    def execute(self: Any, scheduled: Any, intermediate_tensors: Any = None) -> Any:
        return execute_model(self, scheduled, intermediate_tensors)

    runner.execute_model = execute


CHANGES = {
    "from_cli_args is gone": Change(_gone(_engine_args, "from_cli_args"), "EngineArgs.from_cli_args is gone"),
    "from_cli_args is a method": Change(_flags_into_an_instance, "EngineArgs.from_cli_args is no classmethod any more"),
    "add_cli_args takes more": Change(
        _parser_comes_with_a_group, "EngineArgs.add_cli_args does not take (parser) any more"
    ),
    "compute_hash is gone": Change(_gone(_config, "compute_hash"), "VllmConfig.compute_hash is gone"),
    "get_model is gone": Change(_gone(_runner, "get_model"), "GPUModelRunner.get_model is gone"),
    "execute_model takes another argument": Change(
        _another_name_for_what_is_scheduled, "GPUModelRunner.execute_model does not take (scheduler_output) any more"
    ),
}


def _hooking_fails_half_way() -> None:
    from maxact_vllm import instrument

    collect, calls = instrument._collect, iter(range(1000))

    def fail_at_the_fifth(*args: Any, **kwargs: Any) -> None:
        if next(calls) == 4:
            raise RuntimeError("no memory left")
        collect(*args, **kwargs)

    instrument._collect = fail_at_the_fifth


ACCIDENTS = {"hooking fails half-way": Change(_hooking_fails_half_way, "no memory left")}
"""Not vLLM's doing, but ours."""


def look() -> dict[str, Any]:
    """What the canary says, what becomes of ``--plugin maxact``, and the lines logged meanwhile."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from maxact_vllm import canary, logger, plugin, register

    lines: list[str] = []
    logger.addFilter(lambda record: bool(lines.append(record.getMessage())))
    register()
    faults = [fault for *_, fault in canary.by_class() if fault]
    engine_args = _engine_args()
    try:
        parser = engine_args.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
        made = engine_args.from_cli_args(parser.parse_args(["--model", os.curdir, "--plugin", "maxact"]))
        plugin.complete(made)
        plugin.complete(made)  # vLLM may build its configuration more than once
        settings = made.additional_config
    except (AttributeError, TypeError, SystemExit):
        settings = "flag refused"
    return {"faults": faults, "settings": settings, "lines": lines}


def main() -> None:
    """Try all changes, and none."""
    _engine_args(), _config(), _runner()
    for name, change in {"": Change(lambda: None, ""), **CHANGES}.items():
        pid = os.fork()
        if not pid:
            change.make()
            print("LOOK " + json.dumps({"name": name, **look()}), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
