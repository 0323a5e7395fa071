"""Hop 9/9: series in, panels out. Writes the committed dashboards and the rules, for Prometheus and for Kubernetes:
``python -m grafana.build [--output DIR] [--runbook-base URL] [--runbook-ending .html]``.

Run from the root of the repository. The builders are typed, so a dashboard that builds has the structure Grafana reads;
tests/grafana checks the rest (queries, metrics, layout, drift of the committed files).
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any, Final

from grafana.drilldown import site
from grafana.model import model
from grafana.overview import overview
from grafana.own import own
from grafana.reference import render_rules
from grafana_foundation_sdk.cog.encoder import JSONEncoder

HERE: Final = Path(__file__).parent

RUNBOOK_BASE: Final = "docs/runbooks/"
"""What precedes the name of an alert in its runbook_url; without an address of one's own the path in the repository."""

RUNBOOK_ENDING: Final = ".md"
"""What follows it; the site that mkdocs builds has .html."""

DASHBOARDS: Final = {"overview": overview, "model": model, "site": site, "self": own}


def render(dashboard: Any) -> str:
    """The JSON text of a dashboard builder, ending in a newline."""
    document = json.loads(json.dumps(dashboard.build(), cls=JSONEncoder))
    # The builders fix this to "inControlsMenu", which hides links and annotation switches in a menu.
    for shown in (*document["links"], *document["annotations"]["list"]):
        del shown["placement"]
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def with_runbooks(rules: str, base: str, ending: str) -> str:
    """A rules file whose every runbook_url is base, name of the alert, ending."""
    return re.sub(
        r"(runbook_url: ).*(Maxact\w+).*$", lambda match: f"{match[1]}{base}{match[2]}{ending}", rules, flags=re.M
    )


def prometheus_rule(name: str, rules: str) -> str:
    """A rules file as a PrometheusRule of the Prometheus operator; the text stays as it is, comments included."""
    indented = "".join(f"  {line}" if line.strip() else line for line in rules.splitlines(True))
    head = f"apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: {name}\nspec:\n"
    return f"# Generated from {name}.rules.yaml by grafana/build.py.\n{head}{indented}"


def parse_arguments() -> argparse.Namespace:
    """Options of the command line; those of the runbooks have a variable each, so that make passes them on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--runbook-base", default=os.environ.get("RUNBOOK_BASE", RUNBOOK_BASE))
    parser.add_argument("--runbook-ending", default=os.environ.get("RUNBOOK_ENDING", RUNBOOK_ENDING))
    return parser.parse_args()


def main() -> None:
    """Write ``DIR/dashboards/maxact-NAME.json``, and ``DIR/rules`` but for the tests of the rules."""
    arguments = parse_arguments()
    output: Path = arguments.output
    for folder in ("dashboards", "rules"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for name, make in DASHBOARDS.items():
        (output / f"dashboards/maxact-{name}.json").write_text(render(make()), encoding="utf-8")
    alerts = (HERE / "rules/maxact.rules.yaml").read_text("utf-8")
    rules = {
        "maxact": with_runbooks(alerts, arguments.runbook_base, arguments.runbook_ending),
        "maxact-reference": render_rules(),
    }
    for name, text in rules.items():
        (output / f"rules/{name}.rules.yaml").write_text(text, encoding="utf-8")
        (output / f"rules/{name}.prometheusrule.yaml").write_text(prometheus_rule(name, text), encoding="utf-8")


if __name__ == "__main__":
    main()
