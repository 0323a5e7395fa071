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
from grafana.reference import render_rules
from grafana_foundation_sdk.cog.encoder import JSONEncoder

DASHBOARDS = {"overview": overview, "model": model, "site": site, "self": own}


def render(dashboard: Any) -> str:
    """The JSON text of a dashboard builder, ending in a newline."""
    document = json.loads(json.dumps(dashboard.build(), cls=JSONEncoder))
    # The builders fix this to "inControlsMenu", which hides links and annotation switches in a menu.
    for shown in (*document["links"], *document["annotations"]["list"]):
        del shown["placement"]
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def prometheus_rule(name: str, rules: str) -> str:
    """A rules file as a PrometheusRule of the Prometheus operator; the text stays as it is, comments included."""
    indented = "".join(f"  {line}" if line.strip() else line for line in rules.splitlines(True))
    head = f"apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: {name}\nspec:\n"
    return f"# Generated from {name}.rules.yaml by grafana/build.py.\n{head}{indented}"


def main() -> None:
    """Write ``DIR/dashboards/maxact-NAME.json`` and the generated files of ``DIR/rules``."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=here)
    output: Path = parser.parse_args().output
    for folder in ("dashboards", "rules"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for name, make in DASHBOARDS.items():
        (output / f"dashboards/maxact-{name}.json").write_text(render(make()), encoding="utf-8")
    rules = {"maxact": (here / "rules/maxact.rules.yaml").read_text("utf-8"), "maxact-reference": render_rules()}
    (output / "rules/maxact-reference.rules.yaml").write_text(rules["maxact-reference"], encoding="utf-8")
    for name, text in rules.items():
        (output / f"rules/{name}.prometheusrule.yaml").write_text(prometheus_rule(name, text), encoding="utf-8")


if __name__ == "__main__":
    main()
