"""Teaches vLLM two things: our flags, and to show us each worker once its device is up.

Runs in every vLLM process, before the parser is filled. Flags end in ``additional_config["maxact"]``, which vLLM
carries to spawned workers by itself. A worker whose configuration lacks that key is left untouched.

Where vLLM is not as `canary` wants it, the flags are still taken, so that a command line which served yesterday serves
today; the key is then left out, no worker is looked at, and one line says why.
"""

from __future__ import annotations

import argparse
import copy
import functools
import multiprocessing
import os
from typing import Any

from maxact_vllm import canary, logger
from maxact_vllm.config import KEY, PATHS, Settings, SettingsError, disown, graph_key, number
from maxact_vllm.credentials import check_file, check_files

_installed = False
_fault = ""
"""Why nothing will be observed with this vLLM."""


def install() -> None:
    """Wrap what `canary` found intact. Idempotent."""
    global _installed, _fault
    if _installed:
        return
    _installed = True
    door, _fault = canary.at_registration()
    if door:
        _say(f"maxact stays out of the way, flags included: {door}")
        return
    _wrap_engine_args()
    if not _fault:
        _wrap_compute_hash()
        _wrap_worker()


@functools.cache
def _say(text: str) -> None:
    """One line per start: not again, and not in the processes that vLLM's first one starts."""
    if multiprocessing.parent_process() is None:
        logger.warning(text)


def _wrap_engine_args() -> None:
    from vllm.engine.arg_utils import EngineArgs

    add_cli_args = EngineArgs.add_cli_args
    from_cli_args = EngineArgs.from_cli_args.__func__
    create_engine_config = EngineArgs.create_engine_config

    @functools.wraps(add_cli_args)
    def add_with_maxact(parser: Any) -> Any:
        parser = add_cli_args(parser)
        add_flags(parser)
        return parser

    @functools.wraps(from_cli_args)
    def from_cli_with_maxact(cls: Any, args: argparse.Namespace) -> Any:
        engine_args = from_cli_args(cls, args)
        carry_flags(args, engine_args)
        try:
            complete(engine_args)
        except SettingsError as error:  # settings that do not fit together, or come from elsewhere than a flag
            argparse.ArgumentParser().exit(2, f"vllm: error: {error}\n")
        return engine_args

    @functools.wraps(create_engine_config)
    def create_with_maxact(self: Any, *args: Any, **kwargs: Any) -> Any:
        complete(self)
        return create_engine_config(self, *args, **kwargs)

    EngineArgs.add_cli_args = staticmethod(add_with_maxact)
    EngineArgs.from_cli_args = classmethod(from_cli_with_maxact)
    EngineArgs.create_engine_config = create_with_maxact


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--plugin`` and the ``--maxact-*`` flags to vLLM's parser."""
    group = parser.add_argument_group("maxact", "Activation ranges of the served model, streamed to a maxact sidecar.")
    group.add_argument(
        "--plugin",
        choices=["maxact"],
        default=None,
        help="Observe the served model with maxact; any of the flags below asks for it too.",
    )
    for name, metavar, description in _FLAGS:
        flag = f"--maxact-{name.replace('_', '-')}"
        group.add_argument(flag, metavar=metavar, type=_checked(name), help=description)


_FLAGS = (
    ("endpoint", "ADDR", "gRPC address of the sidecar, host:port or unix:/path (default 127.0.0.1:4471)."),
    (
        "sites",
        "PRESET|REGEX",
        "What to observe: serving (default), paper, all, or a regular expression searched in names like "
        "layers.11.hidden.",
    ),
    ("interval", "S", "Seconds between two windows sent to the sidecar (default 1)."),
    ("engine", "NAME", "Name of this engine in metrics (default: its DP rank)."),
    ("tls_ca", "PEM", "TLS to the sidecar, whose certificate this authority signed."),
    ("tls_cert", "PEM", "Certificate to show the sidecar."),
    ("tls_key", "PEM", "Private key of that certificate."),
    ("token_file", "FILE", "Bearer token for the sidecar, in a file; read again at every connect."),
)
"""Setting, placeholder, help."""


def _checked(name: str) -> Any:
    def convert(text: str) -> Any:
        try:
            if name in PATHS:
                check_file(name, text)
                return text
            value: Any = number(text) if name == "interval" else text
            Settings(**{name: value})
        except SettingsError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    return convert


def carry_flags(args: argparse.Namespace, engine_args: Any) -> None:
    """Move our flags from the namespace into ``engine_args.additional_config``. Any of them asks for maxact."""
    given = {name: getattr(args, f"maxact_{name}", None) for name, _, _ in _FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    if getattr(args, "plugin", None) is None and not given:
        return
    already = (engine_args.additional_config or {}).get(KEY) or {}
    engine_args.additional_config = {**(engine_args.additional_config or {}), KEY: {**already, **given}}


def asked_by_environment() -> bool:
    """True where ``VLLM_PLUGINS`` names maxact: the operator chose it among the installed plugins."""
    return "maxact" in [name.strip() for name in os.environ.get("VLLM_PLUGINS", "").split(",")]


def complete(engine_args: Any) -> None:
    """Check and complete the settings before vLLM builds its configuration, long before a model loads."""
    additional = engine_args.additional_config
    if not isinstance(additional, dict | None):
        return
    additional = additional or {}
    if KEY not in additional and not asked_by_environment():
        return
    given = additional.get(KEY) or {}
    if not isinstance(given, dict):
        raise SettingsError(f'additional_config["maxact"]: {given!r} is not a mapping of settings')
    settings = Settings.from_mapping(given)
    check_files(settings)
    if _fault:
        _say(f"maxact stays out of the way, serving goes on unobserved: {_fault}")
        engine_args.additional_config = {name: value for name, value in additional.items() if name != KEY}
        return
    if untried := canary.untried():
        _say(untried)
    engine_args.additional_config = {**additional, KEY: settings.to_mapping()}


def _wrap_compute_hash() -> None:
    """Into vLLM's compile-cache key comes what decides the graph, nothing else: a new endpoint must compile nothing."""
    from vllm.config import VllmConfig

    compute_hash = VllmConfig.compute_hash

    @functools.wraps(compute_hash)
    def compute_hash_of_graph(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = self.additional_config
        if isinstance(given, dict) and isinstance(given.get(KEY), dict):
            self = copy.copy(self)
            self.additional_config = {**given, KEY: graph_key(given[KEY])}
        return compute_hash(self, *args, **kwargs)

    VllmConfig.compute_hash = compute_hash_of_graph


def _wrap_worker() -> None:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    init_device = WorkerWrapperBase.init_device

    @functools.wraps(init_device)
    def init_device_with_maxact(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = init_device(self, *args, **kwargs)
        try:
            _attach(self)
        except Exception as error:
            disown(self.vllm_config)
            logger.warning("maxact does not observe this engine: %s: %s", type(error).__name__, error)
        return result

    WorkerWrapperBase.init_device = init_device_with_maxact


def _attach(wrapper: Any) -> None:
    additional = getattr(wrapper.vllm_config, "additional_config", None)
    if isinstance(additional, dict) and KEY in additional:
        from maxact_vllm import worker

        worker.attach(wrapper.worker, wrapper.vllm_config, additional[KEY])
