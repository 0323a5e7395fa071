"""The reference census as recording rules: what other models carry, at most, at each kind of site.

27 checkpoints of arXiv 2605.15572; calibration/maxact_calibration/reference has it layer by layer. A Prometheus has no
other way to hold constants that a dashboard can select by label.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

CENSUS: Final = Path(__file__).parents[1] / "calibration/maxact_calibration/reference/census_2605.15572.csv"
SERIES: Final = "reference:maxact_absmax:max"

SITES: Final = {
    "embedding_output": "embedding",
    "hidden": "hidden",
    "attn_output": "attn_output",
    "mlp_output": "mlp_output",
    "final_layernorm": "final_norm",
}
"""Site of the census -> site of ours, where both mean the same tensor."""

HEAD: Final = f"""\
# Generated from the reference census (arXiv 2605.15572) by grafana/build.py. Optional: one panel of maxact / Site shows
# it. {SERIES} is the largest absmax of a checkpoint's sites of that kind; layer is where it is.
groups:
  - name: maxact-reference
    interval: 2m
    rules:
"""


def peaks() -> Iterator[tuple[dict[str, str], float]]:
    """(labels, absmax) of the largest row of each checkpoint and kind of site."""
    largest: dict[tuple[str, str], tuple[float, str]] = {}
    with CENSUS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if site := SITES.get(row["site"]):
                key, absmax = (row["model"], site), float(row["absmax"])
                if absmax > largest.get(key, (-1.0, ""))[0]:
                    largest[key] = (absmax, row["layer"])
    for (checkpoint, site), (absmax, layer) in largest.items():
        yield {"checkpoint": checkpoint, "site": site, **({"layer": layer} if layer else {})}, absmax


def render_rules() -> str:
    """The rules file."""
    rules = [
        f"      - {{record: {SERIES}, expr: vector({absmax:.9g}), labels: {json.dumps(labels)}}}\n"
        for labels, absmax in peaks()
    ]
    return HEAD + "".join(rules)
