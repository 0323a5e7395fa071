"""``maxact sites``: what would be observed of a model. No weights are read: the modules are built without memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maxact_proto import stats
from maxact_sidecar.cli import fail

if TYPE_CHECKING:
    from maxact_vllm.instrument import Tap

_MOST_CHARACTERS = 300
_WHY = {"expert_act": "it is made inside a kernel"}
"""Why a site that exists in every mixture is observed in none."""


def sites(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub id, as for vllm serve.")],
    each: Annotated[bool, typer.Option("--each", help="One line per layer instead of one per run of layers.")] = False,
) -> None:
    """List what would be observed of MODEL: site, layers, width, the presets that include it, and the module.

    No traffic and no weights are needed, only the model's configuration. Widths are those without tensor parallelism.

    Example: maxact sites Qwen/Qwen3-8B
    """
    if model.startswith(("/", "./", "../")) and not Path(model).is_dir():
        fail(f"{model}: no such folder")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    taps, missing = _find(model)
    _print(model, taps, missing, each)


def _find(model: str) -> tuple[list[Tap], list[str]]:
    """Sites in the order a token meets them, and names of which the model has none."""
    try:
        from maxact_vllm import compat
    except ImportError as error:
        fail(f"{error}; run this where vLLM is installed")
    try:
        module, config = compat.build_on_meta(model)
    except Exception as error:  # whatever vLLM says of a model it cannot build
        reason = " ".join(str(error).split()) or type(error).__name__
        fail(f"{model}: vLLM cannot build it: {reason[:_MOST_CHARACTERS]}")
    from maxact_vllm.sites import find_taps

    text_config = config.model_config.hf_text_config
    taps = find_taps(module, text_config.hidden_size, text_config.num_hidden_layers)
    if not taps:
        tree = ", ".join(f"{name}: {type(child).__name__}" for name, child in module.named_children())
        fail(
            f"{model}: no list of {text_config.num_hidden_layers} decoder layers in {type(module).__name__} ({tree}); "
            "it would be served unobserved"
        )
    order = list(stats.SITES)
    taps.sort(key=lambda tap: (order.index(tap.name), -1 if tap.layer is None else tap.layer))
    found = {tap.name for tap in taps}
    return taps, [name for name in order if name not in found]


def _print(model: str, taps: Sequence[Tap], missing: Sequence[str], each: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from maxact_vllm.config import PRESETS

    table = Table(title=f"{model}: {len(taps)} sites; the preset all takes every one")
    for heading in ("site", "layers", "width", "presets", "read at"):
        table.add_column(heading, justify="right" if heading == "width" else "left", overflow="fold")
    for group in _runs(taps, each):
        first = group[0]
        presets = [preset for preset, names in PRESETS.items() if names is not None and first.name in names]
        place = f"{first.reads} of {_module(first, len(group))}"
        table.add_row(first.name, _layers(group), f"{first.width:,}", ", ".join(presets), place)
    for name in missing:
        why = _WHY.get(name, "no module has this role")
        table.add_row(name, "-", "-", "-", f"not observed: {why} ({stats.SITES[name]})")
    Console().print(table)


def _runs(taps: Sequence[Tap], each: bool) -> list[list[Tap]]:
    """Neighbouring layers that differ in nothing but their number, together."""

    def kind(tap: Tap) -> tuple[object, ...]:
        return tap.name, tap.width, tap.reads, _without_numbers(tap.path), tap.layer if each else None

    return [list(group) for _, group in itertools.groupby(taps, key=kind)]


def _without_numbers(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _layers(group: Sequence[Tap]) -> str:
    first, last = group[0].layer, group[-1].layer
    if first is None:
        return "-"
    return str(first) if len(group) == 1 else f"{first}-{last}"


def _module(tap: Tap, count: int) -> str:
    return tap.path if count == 1 else _without_numbers(tap.path)
