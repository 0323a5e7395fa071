"""Asks promtool what an expression gives for chosen samples."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def gives(
    expr: str,
    value: float,
    *,
    series: Mapping[str, str],
    at_seconds: int,
    scrape: int,
    folder: Path,
    rules: Sequence[Path] = (),
) -> bool:
    """True where ``expr``, of one series without labels, has this value ``at_seconds``.

    ``series``: name -> samples, one per ``scrape`` seconds; the ``rules`` are evaluated once a minute.
    """
    test = {
        "interval": f"{scrape}s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": expr, "eval_time": f"{at_seconds}s", "exp_samples": [{"labels": "{}", "value": value}]}
        ],
    }
    path = folder / "promql.json"
    names = [str(rule_file) for rule_file in rules]
    path.write_text(json.dumps({"rule_files": names, "evaluation_interval": "1m", "tests": [test]}))
    return subprocess.run(["promtool", "test", "rules", path], capture_output=True).returncode == 0
