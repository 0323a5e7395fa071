"""Hop 9/9: series in, panels out. Writes the committed dashboards and the rules as a Kubernetes resource:
``python -m grafana.build [--output DIR]``.

Run from the root of the repository. The builders are typed, so a dashboard that builds has the structure Grafana reads;
tests/grafana checks the rest (queries, metrics, layout, drift of the committed files).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from grafana.drilldown import site
from grafana.model import model
from grafana.overview import overview
from grafana.own import own
from grafana_foundation_sdk.cog.encoder import JSONEncoder

DASHBOARDS = {"overview": overview, "model": model, "site": site, "self": own}


def render(dashboard: Any) -> str:
    """The JSON text of a dashboard builder, ending in a newline."""
    document = json.loads(json.dumps(dashboard.build(), cls=JSONEncoder))
    # The builders fix this to "inControlsMenu", which hides links and annotation switches in a menu.
    for shown in (*document["links"], *document["annotations"]["list"]):
        del shown["placement"]
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def prometheus_rule(rules: Path) -> str:
    """The rules file as a PrometheusRule of the Prometheus operator; the text stays as it is, comments included."""
    indented = "".join(f"  {line}" if line.strip() else line for line in rules.read_text("utf-8").splitlines(True))
    head = "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: maxact\nspec:\n"
    return f"# Generated from {rules.name} by grafana/build.py.\n{head}{indented}"


def main() -> None:
    """Write ``DIR/dashboards/maxact-NAME.json`` and ``DIR/rules/prometheusrule.yaml``."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=here)
    output: Path = parser.parse_args().output
    for folder in ("dashboards", "rules"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for name, make in DASHBOARDS.items():
        (output / f"dashboards/maxact-{name}.json").write_text(render(make()), encoding="utf-8")
    rule = prometheus_rule(here / "rules/maxact.rules.yaml")
    (output / "rules/prometheusrule.yaml").write_text(rule, encoding="utf-8")


if __name__ == "__main__":
    main()
