"""Recording rules, alerts and their runbooks; the example configurations; checked by Prometheus' own tools."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana.assets import (
    ALERTS,
    FOREIGN,
    GRAFANA,
    RECORDED,
    REFERENCE,
    REFERENCE_RULES,
    ROOT,
    RULE_TESTS,
    RULES,
    alert_template_queries,
    all_queries,
    catalogue,
    metric_names,
    selectors,
)

from maxact_proto import stats
from maxact_sidecar.headroom import MEANINGS

EXPRESSIONS = {**RECORDED, **{name: alert["expr"] for name, alert in ALERTS.items()}}
EXPECTED_ALERTS = {
    "MaxactSaturation",
    "MaxactRangeExceeded",
    "MaxactResolutionLost",
    "MaxactFp16OverflowNear",
    "MaxactNonfiniteActivations",
    "MaxactDriftRising",
    "MaxactStreamDown",
    "MaxactSidecarDown",
    "MaxactSidecarVanished",
    "MaxactSeriesDropped",
}


def run_tool(program: str, *arguments: str) -> str:
    """Output of a program of Prometheus or Alertmanager; skips the test where it is not installed."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    done = subprocess.run([program, *arguments], cwd=GRAFANA, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.server
def test_promtool_accepts_the_rules_and_the_scrape_configuration() -> None:
    assert f"{len(EXPRESSIONS)} rules found" in run_tool("promtool", "check", "rules", str(RULES))
    assert f"{len(REFERENCE_RULES)} rules found" in run_tool("promtool", "check", "rules", str(REFERENCE))
    run_tool("promtool", "check", "config", "prometheus.yml")


@pytest.mark.server
def test_promtool_rule_tests_pass() -> None:
    assert "SUCCESS" in run_tool("promtool", "test", "rules", str(RULE_TESTS))


@pytest.mark.server
def test_amtool_accepts_the_alertmanager_example() -> None:
    assert "SUCCESS" in run_tool("amtool", "check-config", "alertmanager.yml")


def rule_test_steps() -> dict[str, list[bool]]:
    """Alert -> whether it fires, step by step, of every test in the order of time."""
    steps: dict[str, list[bool]] = {}
    for test in yaml.safe_load(RULE_TESTS.read_bytes())["tests"]:
        for step in test.get("alert_rule_test", ()):
            steps.setdefault(step["alertname"], []).append(bool(step.get("exp_alerts")))
    return steps


@pytest.mark.parametrize("name", sorted(EXPECTED_ALERTS))
def test_every_alert_is_tested_silent_firing_and_resolved(name: str) -> None:
    fired = "".join("x" if firing else "." for firing in rule_test_steps()[name])
    assert re.search(r"\.x+\.", fired), f"{name}: {fired}"


def test_the_alerts_are_the_ones_promised() -> None:
    assert set(ALERTS) == EXPECTED_ALERTS


@pytest.mark.parametrize("name", sorted(EXPECTED_ALERTS))
def test_every_alert_says_what_where_and_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("info", "warning", "critical")
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert "{{" in alert["annotations"]["summary"], "names no place"
    assert re.search(r"\$value|query", alert["annotations"]["description"]) or name == "MaxactSidecarDown"
    page = alert["annotations"]["runbook_url"]
    assert page == f"docs/runbooks/{name}.md"
    text = (ROOT / page).read_text()
    assert text.startswith(f"# {name}\n")
    for heading in ("What it means", "Is it urgent?", "What to look at", "What to do"):
        assert f"\n## {heading}\n" in text, f"{page} lacks {heading!r}"
    assert f"severity: {alert['labels']['severity']}" in text, "the page tells another severity"
    assert f"]({name}.md)" in (ROOT / "docs/runbooks/index.md").read_text()


@pytest.mark.parametrize("given", ["options", "variables"])
def test_runbooks_are_where_one_says_in_everything_that_carries_the_rules(given: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "grafana.build", "--output", str(tmp_path)]
    base, ending = "https://docs.example.org/runbooks/", ".html"
    options = ["--runbook-base", base, "--runbook-ending", ending] if given == "options" else []
    named = {} if options else {"RUNBOOK_BASE": base, "RUNBOOK_ENDING": ending}
    subprocess.run([*command, *options], cwd=ROOT, env={**os.environ, **named}, check=True)
    carriers = {path.name: path.read_text() for path in tmp_path.glob("*/*") if "alert:" in path.read_text()}
    assert set(carriers) == {"maxact.rules.yaml", "maxact.prometheusrule.yaml"}
    for text in carriers.values():
        document = yaml.safe_load(text)
        rules = [rule for group in document.get("spec", document)["groups"] for rule in group["rules"]]
        links = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in rules if "alert" in rule}
        assert links == {name: f"{base}{name}{ending}" for name in ALERTS}


NOT_JUDGED = "The sidecar of this version does not judge this meaning yet: the alert stays silent."


@pytest.mark.parametrize("name", sorted(EXPECTED_ALERTS))
def test_a_runbook_says_where_the_sidecar_cannot_raise_its_flag(name: str) -> None:
    meanings = set(re.findall(r'meaning="(\w+)"', ALERTS[name]["expr"].partition("unless")[0]))
    told = NOT_JUDGED in " ".join((ROOT / f"docs/runbooks/{name}.md").read_text().split())
    assert told == (not meanings <= set(MEANINGS))


def test_the_reference_rules_hold_the_peaks_of_the_census() -> None:
    recorded = {
        (rule["labels"]["checkpoint"], rule["labels"]["site"]): (rule["labels"].get("layer"), rule["expr"])
        for rule in REFERENCE_RULES
    }
    assert len(recorded) == len(REFERENCE_RULES) == 27 * 5
    assert {site for _, site in recorded} <= set(stats.SITES)
    # Read off the census by hand.
    assert recorded["Qwen2.5-1.5B-Instruct", "hidden"] == ("5", "vector(7968)")
    assert recorded["Qwen2.5-1.5B-Instruct", "embedding"] == (None, "vector(0.30078125)")


def test_every_runbook_belongs_to_an_alert() -> None:
    pages = {path.stem for path in (ROOT / "docs/runbooks").glob("*.md")} - {"index"}
    assert pages == set(ALERTS)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_rule_reads_series_and_labels_that_exist(name: str) -> None:
    check_series(EXPRESSIONS[name])


@pytest.mark.parametrize(("alert", "expr"), alert_template_queries())
def test_every_query_in_an_annotation_reads_series_that_exist(alert: str, expr: str) -> None:
    check_series(expr)


def check_series(expr: str) -> None:
    known = {**catalogue(), **FOREIGN}
    for name, matchers in selectors(expr):
        if name not in RECORDED:
            assert name in known, f"{name} does not exist"
            assert set(matchers) <= known[name]


def test_every_metric_is_shown_or_watched() -> None:
    used: set[str] = set()
    for expr in (*EXPRESSIONS.values(), *(query.runnable for query in all_queries())):
        used |= metric_names(expr)
    # A histogram is read through its buckets and its sum; a lag has no total.
    unread = {name for name in set(catalogue()) - used if not name.endswith(("_count", "_lag_seconds_sum"))}
    assert {name for name in unread if name.startswith("maxact_")} == set()


def test_every_recorded_series_is_read_or_made_for_federation() -> None:
    used: set[str] = set()
    for expr in (*EXPRESSIONS.values(), *(query.runnable for query in all_queries())):
        used |= metric_names(expr)
    for name in set(RECORDED) - used:
        assert name.startswith("model:"), f"nothing reads {name}"


def test_alertmanager_knows_only_alerts_that_exist() -> None:
    named = set(re.findall(r"Maxact\w+", (GRAFANA / "alertmanager.yml").read_text()))
    assert named <= set(ALERTS)


def load(path: str) -> Any:
    return yaml.safe_load((GRAFANA / path).read_bytes())


def test_provisioning_leads_to_the_dashboards_and_a_prometheus() -> None:
    (source,) = load("provisioning/datasources/maxact.yaml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "$MAXACT_PROMETHEUS_URL")
    assert source["jsonData"]["timeInterval"] == load("prometheus.yml")["global"]["scrape_interval"]
    (provider,) = load("provisioning/dashboards/maxact.yaml")["providers"]
    assert provider["options"]["path"] == "$MAXACT_DASHBOARDS"


@pytest.mark.parametrize("interval", ["scrape_interval", "evaluation_interval"])
def test_a_spike_meets_a_scrape_and_an_evaluation(interval: str) -> None:
    """The sidecar shows an extremum for at least half of its hold horizon."""
    from maxact_sidecar.config import Settings

    seconds = load("prometheus.yml")["global"][interval].removesuffix("s")
    assert float(seconds) <= Settings().hold / 2
