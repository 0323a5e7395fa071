"""PromQL of the dashboards: metric names, label matchers of the variables, and the expressions several panels share."""

from __future__ import annotations

from typing import Final, Literal

Scope = Literal["target", "engine", "site"]

LAYERED: Final = 'layer!=""'
"""Matcher of the sites in decoder layers; embedding and final_norm have none."""

SHOWN_FORMAT: Final = 'format=~"$format"'
"""Matcher of the one format that a board shows."""

INT8: Final = 'format="int8"'

MOST_LINES: Final = 24
"""Series in a panel where every site would be a line."""

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


def margin(*more: str, **equal: str) -> str:
    """Headroom ratio over the threshold of its criterion: below 1 the flag is raised, whatever the threshold is."""
    return select("site:maxact_headroom_margin:ratio", "site", *more, **equal)


def worst_margin(*more: str, **equal: str) -> str:
    """Margin of now; while a flag is raised the worst of ten minutes, so that its site shows the reason."""
    return _worst("site:maxact_headroom_margin:ratio", *more, **equal)


def worst_ratio(*more: str, **equal: str) -> str:
    """`worst_margin` as a headroom ratio."""
    return _worst("maxact_headroom_ratio", *more, **equal)


def _worst(metric: str, *more: str, **equal: str) -> str:
    series = select(metric, "site", *more, **equal)
    raised = f"{select('site:maxact_headroom_flag:held', 'site', *more, **equal)} == 1"
    return f"(min_over_time({series}[10m]) and {raised} or {series})"


def extreme(series: str, *, lowest: bool = False) -> str:
    """Of many series those with the largest (lowest) values of the time range, so that All stays readable."""
    keep, over = ("bottomk", "min_over_time") if lowest else ("topk", "max_over_time")
    return f"{series} and {keep}({MOST_LINES}, {over}({series}[$__range] @ end()))"


def newly(expression: str, *, before: str = "") -> str:
    """Series of ``expression`` where ``before`` (the same, unless given) had none at the step before."""
    return f"{expression} unless {before or expression} offset $__interval"


def quantile(q: float, histogram: str, scope: Scope) -> str:
    """A quantile of a Prometheus histogram over the panel's rate interval."""
    buckets = select(f"{histogram}_bucket", scope)
    return f"histogram_quantile({q}, sum by (le) (rate({buckets}[$__rate_interval])))"
