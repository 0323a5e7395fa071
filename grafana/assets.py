"""What the committed dashboards and rules contain, as plain data: panels, queries, rules, metric names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final

import promql_parser
import yaml
from prometheus_client import Metric

from maxact_sidecar.families import DETAIL, FAMILIES, SelfMetrics

ROOT: Final = Path(__file__).parents[1]
GRAFANA: Final = ROOT / "grafana"
RULES: Final = GRAFANA / "rules/maxact.rules.yaml"
REFERENCE: Final = GRAFANA / "rules/maxact-reference.rules.yaml"
RULE_TESTS: Final = GRAFANA / "rules/maxact.rules.test.yaml"

DASHBOARDS: Final[dict[str, dict[str, Any]]] = {
    path.stem: json.loads(path.read_bytes()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))
}
GROUPS: Final[list[dict[str, Any]]] = yaml.safe_load(RULES.read_bytes())["groups"]
ALERTS: Final = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}
RECORDED: Final = {rule["record"]: rule["expr"] for group in GROUPS for rule in group["rules"] if "record" in rule}
REFERENCE_RULES: Final[list[dict[str, Any]]] = yaml.safe_load(REFERENCE.read_bytes())["groups"][0]["rules"]
RECORDED_LABELS: Final = {name: None for name in RECORDED} | {
    rule["record"]: {"checkpoint", "site", "layer"} for rule in REFERENCE_RULES
}
"""Series that rules record -> their labels; None: those of what they are made from."""

TARGET_LABELS: Final = {"job", "instance"}
FOREIGN: Final = {
    "up": TARGET_LABELS,
    "scrape_duration_seconds": TARGET_LABELS,
    "ALERTS": {*TARGET_LABELS, "alertname", "alertstate", "severity"},
}
"""Series that Prometheus itself makes, and their labels."""


@dataclass(frozen=True, slots=True)
class Query:
    """One expression of a dashboard and where it stands."""

    where: str
    expr: str
    panel: dict[str, Any] | None = None
    """None for an annotation and a variable."""
    instant: bool = False
    """Asked for one moment, as tables are, not for a range."""
    label: str = ""
    """Whose values a variable offers: those that the series of ``expr`` have."""

    @property
    def runnable(self) -> str:
        """The expression with every variable at All, ready for Prometheus."""
        return substitute(self.expr)


def substitute(expr: str, *, step: str = "1m") -> str:
    """The expression as Grafana sends it with every variable at All."""
    expr = expr.replace("$__rate_interval", "1m").replace("$__interval", step).replace("$__range", "1h")
    return re.sub(r'"(\|?)\$(\w+)"', lambda match: f'"{match[1]}.{"*" if match[2] == "layer" else "+"}"', expr)


def queries(dashboard: dict[str, Any]) -> Iterator[Query]:
    """Every expression of a dashboard: panels, annotations, variables."""
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            where = f"{dashboard['uid']} / {panel['title']} / {target['refId']}"
            yield Query(where, target["expr"], panel, instant=target.get("instant", False))
    for annotation in dashboard["annotations"]["list"]:
        yield Query(f"{dashboard['uid']} / annotation {annotation['name']}", annotation["target"]["expr"])
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            selector, _, label = variable["query"]["query"].removeprefix("label_values(").rpartition(", ")
            yield Query(f"{dashboard['uid']} / variable {variable['name']}", selector, label=label.removesuffix(")"))


def all_queries() -> list[Query]:
    """Every expression of every dashboard."""
    return [query for dashboard in DASHBOARDS.values() for query in queries(dashboard)]


def children(node: promql_parser.Expr) -> list[promql_parser.Expr]:
    """The expressions that an expression is made of; that of a range is its selector."""
    if isinstance(node, promql_parser.MatrixSelector):
        return [node.vector_selector]
    parts = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "param")]
    return [part for part in (*parts, *getattr(node, "args", ())) if isinstance(part, promql_parser.Expr)]


def selectors(expr: str) -> list[tuple[str, dict[str, str]]]:
    """(metric, {label: matcher value}) of every selector in an expression without Grafana variables."""
    found: list[tuple[str, dict[str, str]]] = []
    pending = [promql_parser.parse(expr)]
    while pending:
        node = pending.pop()
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name or "", {matcher.name: matcher.value for matcher in node.matchers.matchers}))
        pending += children(node)
    return found


def metric_names(expr: str) -> set[str]:
    """Names of the series an expression reads."""
    return {name for name, _ in selectors(expr)}


def catalogue() -> dict[str, set[str]]:
    """Labels of every series the sidecar can expose, target labels included."""
    families = chain(FAMILIES, *DETAIL.values())
    labels = {family.name: {*family.labels, *TARGET_LABELS} for family in families}
    metrics = SelfMetrics()
    metrics.windows_rejected.labels(reason="layout.stats")
    for family in metrics.registry.collect():
        labels |= {name: own | TARGET_LABELS for name, own in _samples(family).items()}
    return labels


def _samples(family: Metric) -> dict[str, set[str]]:
    return {sample.name: set(sample.labels) for sample in family.samples if not sample.name.endswith("_created")}


def alert_template_queries() -> list[tuple[str, str]]:
    """(alert, expression) of every query inside an annotation template, its label values made match anything."""
    found = []
    for name, alert in ALERTS.items():
        for text in alert["annotations"].values():
            for template in re.findall(r'printf "([^"]*\{[^"]*)"', text):
                found.append((name, template.replace("=%q", '=~".*"')))
    return found
