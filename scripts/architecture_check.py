"""What the results of one architecture say: pure functions over the JSON that `architecture_run` writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

Result = Mapping[str, Any]

PER_LAYER: Final = (
    *("hidden", "attn_input", "o_proj_input", "attn_output", "mlp_input", "down_proj_input", "mlp_output"),
)
_OF_MLP: Final = ("mlp_input", "down_proj_input", "mlp_output")
OF_SOME: Final = ("k", "v", "mlp_gate", "router_logits", "moe_input", "attn_post_norm", "post_norm")
"""Sites that a layer has only where a plain hook found the module."""
_OUTPUT: Final = {"MLP": "mlp_output", "attention": "attn_output"}
ONCE: Final = ("embedding", "final_norm")


def observed(result: Result) -> list[Any]:
    """The sites that saw anything."""
    return [site for site in result["sites"] if any(top >= bottom for top, bottom in site["extrema"])]


def differences(native: Result) -> list[str]:
    """Sites whose extrema in any phase are not, bit for bit, those of the plain hooks; and why, in words."""
    found = []
    for site in observed(native):
        name, raw = site["site"], native["raw"].get(site["site"])
        if raw is None:
            found.append(f"{name}: no plain hook knows a module of this role, maxact reads {site['path']}")
        elif raw != site["extrema"]:
            found.append(f"{name}: maxact {site['extrema']} at {site['path']}, the plain hook {raw}")
    return found


def unobserved(native: Result) -> dict[str, list[int | None]]:
    """Site names that the model should have and maxact does not observe, and in which layers."""
    seen = {site["site"] for site in observed(native)}
    found: dict[str, list[int | None]] = defaultdict(list)
    for name in ONCE:
        if f"-.{name}" not in seen:
            found[name].append(None)
    for layer in range(len(native["layers"])):
        expected = [name for name in OF_SOME if isinstance(native["raw"].get(f"{layer}.{name}"), list)]
        for name in (*PER_LAYER, *expected):
            if f"{layer}.{name}" not in seen:
                found[name].append(layer)
    return dict(found)


def reason(native: Result, name: str, layer: int | None) -> str:
    """Why a site is not observed, from what the modules of its layer are."""
    if layer is None:
        raw = native["raw"].get(f"-.{name}")
        return f"its rows are not the tokens: {raw}" if isinstance(raw, str) else "no module has this role"
    raw = native["raw"].get(f"{layer}.{name}")
    if isinstance(raw, str):
        return f"its rows are not the tokens: {raw}"
    block = "MLP" if name in _OF_MLP else "attention"
    if f"{layer}.{name}" in native["raw_paths"] or name == "hidden":
        return "not found"
    if f"{layer}.{_OUTPUT[block]}" not in native["raw_paths"]:
        return f"no {block} in the layer"
    if any("expert" in path for path in native["layers"][layer]):
        return "routed experts are no modules"
    return "no linear layer there is a module"


def worst_deviation(native: Result, compiled: Result) -> float:
    """The largest relative deviation of absmax, over all sites and phases, of compiled from native."""
    expected = {site["site"]: _absmax(site["extrema"]) for site in observed(native)}
    seen = {site["site"]: _absmax(site["extrema"]) for site in observed(compiled)}
    if expected.keys() != seen.keys():
        return float("inf")
    return max(
        abs(now / then - 1.0) if then else abs(now)
        for name in expected
        for now, then in zip(seen[name], expected[name], strict=True)
    )


def transformers_deviation(native: Result, hidden: Sequence[float]) -> float | None:
    """The largest relative deviation of `hidden` over the prompts from what transformers computes, layer by layer."""
    absmax = {site["site"]: max(_absmax(site["extrema"])[:2]) for site in observed(native)}
    if any(f"{layer}.hidden" not in absmax for layer in range(len(hidden))):
        return None
    return max(abs(absmax[f"{layer}.hidden"] / value - 1.0) for layer, value in enumerate(hidden))


def _absmax(extrema: Sequence[Sequence[float]]) -> list[float]:
    return [max(abs(top), abs(bottom)) for top, bottom in extrema]
