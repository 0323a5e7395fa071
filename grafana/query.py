"""PromQL of the dashboards: metric names, label matchers of the variables, and the expressions several panels share."""

from __future__ import annotations

from typing import Final, Literal

Scope = Literal["target", "engine", "site"]

LAYERED: Final = 'layer!=""'
"""Matcher of the sites in decoder layers; embedding and final_norm have none."""

_MATCHERS: Final = {
    "target": ("job", "instance"),
    "engine": ("job", "instance", "model_name", "engine"),
    "site": ("job", "instance", "model_name", "engine", "layer", "site"),
}
"""Variables that narrow a series, by how much of its labels it has."""


def select(metric: str, scope: Scope, *more: str, **equal: str) -> str:
    """``metric{...}`` narrowed by the variables of ``scope`` and by further matchers, ``'a!="b"'`` or ``a="b"``."""
    variables = [f'{name}=~"${name}"' for name in _MATCHERS[scope]]
    fixed = [f'{name}="{value}"' for name, value in equal.items()]
    return f"{metric}{{{', '.join([*variables, *fixed, *more])}}}"


def margin(*more: str, scope: Scope = "site", **equal: str) -> str:
    """Headroom ratio over the threshold of its meaning: below 1 the flag is raised, whatever the threshold is."""
    ratio = select("maxact_headroom_ratio", scope, *more, **equal)
    threshold = select("maxact_headroom_threshold_ratio", "target")
    return f"{ratio} / on (job, instance, meaning) group_left () {threshold}"


def newly(expression: str, seconds: int, *, before: str = "") -> str:
    """Series of ``expression`` where ``before`` (the same, unless given) had none that many seconds ago."""
    return f"{expression} unless {before or expression} offset {seconds}s"


def quantile(q: float, histogram: str, scope: Scope) -> str:
    """A quantile of a Prometheus histogram over the panel's rate interval."""
    buckets = select(f"{histogram}_bucket", scope)
    return f"histogram_quantile({q}, sum by (le) (rate({buckets}[$__rate_interval])))"
