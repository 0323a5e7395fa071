"""Writes docs/metrics.md from the catalogue: ``metrics_page.py [FILE]``. A test holds the committed page against it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from maxact_sidecar.config import Settings
from maxact_sidecar.families import DETAIL, FAMILIES, OWN, Family
from maxact_sidecar.headroom import MEANINGS
from maxact_sidecar.resolution import OCTAVES

PAGE = Path(__file__).resolve().parents[1] / "docs/metrics.md"

HEAD = """# Metrics

<!-- Written by scripts/metrics_page.py from sidecar/maxact_sidecar/families.py: run `make metrics-page`. -->

Served at `/metrics`, as text or OpenMetrics, gzipped on request. Names are an interface: they change with a major
version only. A value that is not known is an absent series. `job` and `instance` are added by Prometheus.

Labels: `layer` is the global index of the decoder layer, absent for `embedding` and `final_norm`; `phase` is `first`
(position 0 of a sequence), `prefill` or `decode`; `meaning` is what headroom is judged against, {meanings};
`format` is a [number format](formats.md), absent where a meaning has none.
A gauge tells of the last {hold:g} s (`--hold`), at least of half of them. The series of an engine disappear {stale:g} s
(`--stale`) after its last worker left; while one of several workers is away, its `maxact_rank_up` is 0 and its values
fade from the gauges. A scrape has at most {max_series:,} series (`--max-series`); `maxact_series_dropped_total` counts
what did not fit, which is cut from the end of this table.

## Of engines and sites

"""

DETAIL_HEAD = """
## On request

`/metrics?detail=histogram` adds the shape of what sites carry: a series for every octave (factor of two) between the
smallest and the largest magnitude of a site, at most {octaves}; the shares of a site add up to 1.
`/metrics?detail=rank` adds every worker on its own: when a statistic looks wrong, which worker is it? Two series for
each of its sites and phases. `/metrics?detail=histogram&detail=rank` adds both. Where `--max-series` cuts, they are the
first to go.

Three panels of *maxact / Site* draw them. In Prometheus, `params` of the one job for the sidecar asks for them, as
`grafana/prometheus.yml` does; a second job for the same sidecar would have all its other series twice:

    scrape_configs:
      - job_name: maxact
        params: {{detail: [histogram, rank]}}

"""

OWN_HEAD = """
## Of the sidecar itself

"""

PROCESS_HEAD = """
## Of the process

What `prometheus_client` says of every process on Linux.

| metric | type | meaning |
|---|---|---|
"""

PROCESS = {
    "process_resident_memory_bytes": ("gauge", "Memory in use; docs/sizing.md says what to expect"),
    "process_virtual_memory_bytes": ("gauge", "Address space"),
    "process_cpu_seconds_total": ("counter", "CPU time; its rate is cores"),
    "process_start_time_seconds": ("gauge", "When it started, seconds since the epoch"),
    "process_open_fds": ("gauge", "Open file descriptors: one for each worker and HTTP client, and a few"),
    "process_max_fds": ("gauge", "How many it may open"),
}

RECORDED_HEAD = """
## Recorded series

`grafana/rules/maxact.rules.yaml` records these. `model:` and `fleet:` series have no instance and are few: made for
federation and long storage.

| series | meaning |
|---|---|
"""

RECORDED = {
    "meaning:maxact_headroom_threshold_ratio:max": "Threshold of each meaning and format",
    "maxact:drift_ratio:floor": "Threshold: share of the calibrated range that counts as near its end",
    "maxact:drift_ratio:growth": "Threshold: growth over the mean of the day before",
    "maxact:zeroed_ratio:limit": "Threshold: share of elements that may be rounded to zero",
    "maxact:sqnr_decibels:floor": "Threshold: least signal to quantization noise, dB",
    "maxact:window_age_seconds:limit": "Threshold: silence of a connected worker",
    "site:maxact_drift_ratio:max1h": "Share of the calibrated range that the largest magnitude of the last hour used",
    "site:maxact_headroom_margin:ratio": "Headroom ratio over its threshold; below 1 the flag is raised",
    "layer:maxact_absmax:max": "Largest absmax of a layer",
    "layer:maxact_headroom_margin:min": "Smallest margin of a layer",
    "model:maxact_absmax:max": "Largest absmax of a model",
    "model:maxact_headroom_margin:min": "Smallest margin of a model",
    "model:maxact_headroom_flags:sum": "Raised flags of a model",
    "model:maxact_tokens:rate5m": "Token rows per second of a model",
    "fleet:maxact_headroom_margin:min": "Smallest margin of all models",
    "fleet:maxact_headroom_flags:sum": "Raised flags of all models",
    "fleet:maxact_sidecars:up": "Sidecars that can be scraped",
    "fleet:maxact_ranks:up": "Workers that are connected",
    "instance:maxact_sidecar:up": "1 or 0 per sidecar, known or named after maxact",
    "site:maxact_headroom_flag:held": "The flag, kept at its last value while its sidecar is down",
    "site:maxact_nonfinite_tokens:held": "Non-finite token rows of ten minutes, kept while the sidecar is down",
    "instance:maxact_warnings:count": "Raised flags of clipping and sites with non-finite values, per sidecar",
}


def render() -> str:
    """The page."""
    settings = Settings()
    meanings = [f"`{meaning}`" for meaning in MEANINGS]
    head = HEAD.format(
        meanings=f"{', '.join(meanings[:-1])} or {meanings[-1]}",
        hold=settings.hold,
        stale=settings.stale,
        max_series=settings.max_series,
    )
    details = [family for families in DETAIL.values() for family in families]
    on_request = DETAIL_HEAD.format(octaves=len(OCTAVES))
    tables = [head, _table(FAMILIES), on_request, _table(details), OWN_HEAD, _table(OWN)]
    process = [f"| `{name}` | {kind} | {meaning} |\n" for name, (kind, meaning) in PROCESS.items()]
    recorded = [f"| `{name}` | {meaning} |\n" for name, meaning in RECORDED.items()]
    return "".join([*tables, PROCESS_HEAD, *process, RECORDED_HEAD, *recorded])


def _table(families: Iterable[Family]) -> str:
    rows = "".join(
        f"| `{family.name}` | {family.type} | {', '.join(family.labels)} | {family.unit} | "
        f"{family.help}<br>`{family.example}` |\n"
        for family in families
    )
    return f"| metric | type | labels | unit | meaning, and a query |\n|---|---|---|---|---|\n{rows}"


if __name__ == "__main__":
    (Path(sys.argv[1]) if sys.argv[1:] else PAGE).write_text(render(), encoding="utf-8")
