"""Hop 8/9: the catalogue of metrics. Names, types and labels are an interface: dashboards and alerts hang on them.

`FAMILIES` holds what `collector` renders from snapshots, `DETAIL` what it adds for who asks for it. Metrics about the
sidecar itself (`OWN`) are few and go through `prometheus_client` (`SelfMetrics`). docs/metrics.md is made from these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)

from maxact_sidecar import __version__

SITE: Final = ("model_name", "engine", "layer", "site")
PHASED: Final = (*SITE, "phase")
FORMATTED: Final = (*SITE, "format")
CRITERION: Final = ("meaning", "format")
JUDGED: Final = (*SITE, *CRITERION)
RANK: Final = ("model_name", "engine", "rank")
ENGINE: Final = ("model_name", "engine")
RANK_PHASED: Final = (*RANK, "layer", "site", "phase")
OCTAVES: Final = (*SITE, "octave")

Detail = Literal["histogram", "rank"]
"""What `DETAIL` is asked for by."""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: what its series mean."""

    name: str
    type: Literal["gauge", "counter", "histogram", "info"]
    labels: tuple[str, ...]
    unit: str
    help: str
    example: str = ""
    """A PromQL query that somebody would ask of it."""

    @property
    def format(self) -> str:
        """Of a value: nine digits hold every float32 and take a third of the time; counts and times need more."""
        return "%.9g" if self.unit in ("activation", "ratio", "dB") else "%r"


FAMILIES: Final = (
    Family("maxact_engines", "gauge", (), "", "Engines whose series are shown", "sum(maxact_engines)"),
    Family(
        "maxact_rank_up",
        "gauge",
        RANK,
        "",
        "1 while the worker's stream is connected, else 0",
        "maxact_rank_up == 0",
    ),
    Family(
        "maxact_rank_last_window_timestamp_seconds",
        "gauge",
        RANK,
        "seconds",
        "When the worker's last window arrived",
        "time() - maxact_rank_last_window_timestamp_seconds",
    ),
    Family(
        "maxact_windows_total",
        "counter",
        ENGINE,
        "windows",
        "Windows merged",
        "sum by (engine) (rate(maxact_windows_total[5m]))",
    ),
    Family(
        "maxact_windows_coalesced_total",
        "counter",
        ENGINE,
        "windows",
        "Windows merged by workers while unsent",
        "increase(maxact_windows_coalesced_total[1h]) > 0",
    ),
    Family(
        "maxact_tokens_total",
        "counter",
        (*ENGINE, "phase"),
        "tokens",
        "Token rows that went through the model",
        "sum by (phase) (rate(maxact_tokens_total[5m]))",
    ),
    Family(
        "maxact_cached_tokens_total",
        "counter",
        ENGINE,
        "tokens",
        "Tokens taken from the prefix cache, so neither computed nor measured",
        "rate(maxact_cached_tokens_total[5m])",
    ),
    Family(
        "maxact_card_info",
        "gauge",
        ("model_name", "card", "bos"),
        "",
        "1 for each calibration card in use",
        "count by (model_name) (maxact_card_info)",
    ),
    Family(
        "maxact_headroom_threshold_ratio",
        "gauge",
        CRITERION,
        "ratio",
        "A flag is raised when the headroom ratio falls below this",
        "max by (meaning, format) (maxact_headroom_threshold_ratio)",
    ),
    Family(
        "maxact_headroom_flag",
        "gauge",
        JUDGED,
        "",
        "1 while the headroom flag is raised, else 0",
        "sum by (model_name, meaning, format) (maxact_headroom_flag)",
    ),
    Family(
        "maxact_headroom_flag_since_timestamp_seconds",
        "gauge",
        JUDGED,
        "seconds",
        "When the flag was raised; only while it is",
        "time() - maxact_headroom_flag_since_timestamp_seconds",
    ),
    Family(
        "maxact_headroom_first_exceeded_timestamp_seconds",
        "gauge",
        JUDGED,
        "seconds",
        "When a window was first beyond the threshold, over restarts; only where one was",
        'topk(10, maxact_headroom_first_exceeded_timestamp_seconds{meaning="range"})',
    ),
    Family(
        "maxact_headroom_windows_total",
        "counter",
        JUDGED,
        "windows",
        "Windows with tokens since one was first beyond the threshold; every worker has its own",
        'rate(maxact_headroom_windows_total{meaning="range"}[1h])',
    ),
    Family(
        "maxact_headroom_windows_exceeded_total",
        "counter",
        JUDGED,
        "windows",
        "Of these windows, those beyond the threshold",
        "rate(maxact_headroom_windows_exceeded_total[1h]) / rate(maxact_headroom_windows_total[1h])",
    ),
    Family(
        "maxact_headroom_phase_windows_exceeded_total",
        "counter",
        (*JUDGED, "phase"),
        "windows",
        "Of these windows, those beyond the threshold in a phase; not in a block format",
        "sum by (phase) (increase(maxact_headroom_phase_windows_exceeded_total[1h]))",
    ),
    Family(
        "maxact_headroom_ratio",
        "gauge",
        JUDGED,
        "ratio",
        "Limit / absmax over the hold horizon; < 1: beyond it. In a block format, of the largest of a typical block",
        'bottomk(10, maxact_headroom_ratio{meaning="range"})',
    ),
    Family(
        "maxact_headroom_limit",
        "gauge",
        JUDGED,
        "activation",
        "Limit that the site is judged against",
        'maxact_headroom_limit{meaning="saturation"} / 127',
    ),
    Family(
        "maxact_zeroed_ratio",
        "gauge",
        FORMATTED,
        "ratio",
        "Share of elements that round to zero in a format at the scale of absmax, estimated from a sample",
        'topk(10, maxact_zeroed_ratio{format="int8"})',
    ),
    Family(
        "maxact_sqnr_decibels",
        "gauge",
        FORMATTED,
        "dB",
        "Signal to quantization noise of a format at the scale of absmax, estimated from a sample",
        'maxact_sqnr_decibels{format="int8"} < 20',
    ),
    Family(
        "maxact_saturation_ratio",
        "gauge",
        PHASED,
        "ratio",
        "Share of elements beyond the limit of the checkpoint's static scale, over the hold horizon",
        "topk(10, maxact_saturation_ratio)",
    ),
    Family(
        "maxact_saturated_total",
        "counter",
        PHASED,
        "elements",
        "Elements beyond the limit of the checkpoint's static scale",
        "sum by (layer, site) (increase(maxact_saturated_total[1h])) > 0",
    ),
    Family(
        "maxact_zeroed_total",
        "counter",
        PHASED,
        "elements",
        "Elements that the checkpoint's static scale rounds to zero",
        "rate(maxact_zeroed_total[5m]) / rate(maxact_scaled_elements_total[5m])",
    ),
    Family(
        "maxact_scaled_elements_total",
        "counter",
        PHASED,
        "elements",
        "Elements to which the checkpoint's static scale was applied",
        "sum by (site) (rate(maxact_scaled_elements_total[5m]))",
    ),
    Family(
        "maxact_nonfinite_tokens_total",
        "counter",
        PHASED,
        "tokens",
        "Token rows holding a NaN or an infinity",
        "sum by (model_name, layer) (increase(maxact_nonfinite_tokens_total[1h])) > 0",
    ),
    Family(
        "maxact_absmax",
        "gauge",
        PHASED,
        "activation",
        "Largest magnitude over the hold horizon",
        'max by (layer) (maxact_absmax{site="hidden"})',
    ),
    Family(
        "maxact_absmax_high_water",
        "gauge",
        PHASED,
        "activation",
        "Largest magnitude ever seen",
        "topk(10, max by (layer, site) (maxact_absmax_high_water))",
    ),
    Family(
        "maxact_max",
        "gauge",
        PHASED,
        "activation",
        "Largest signed value over the hold horizon",
        'maxact_max{layer="0",site="hidden"}',
    ),
    Family(
        "maxact_min",
        "gauge",
        PHASED,
        "activation",
        "Smallest signed value over the hold horizon",
        "(maxact_max + maxact_min) / (maxact_max - maxact_min)",
    ),
    Family(
        "maxact_rms",
        "gauge",
        PHASED,
        "activation",
        "Root mean square over the hold horizon",
        'maxact_rms{phase="decode"}',
    ),
    Family(
        "maxact_mean_abs",
        "gauge",
        PHASED,
        "activation",
        "Mean magnitude over the hold horizon",
        "maxact_rms / maxact_mean_abs",
    ),
    Family(
        "maxact_crest_ratio",
        "gauge",
        PHASED,
        "ratio",
        "Crest factor absmax / rms over the hold horizon",
        "topk(10, maxact_crest_ratio)",
    ),
)
"""What is rendered from snapshots, in this order: where the series cap cuts, it cuts from the end."""

DETAIL: Final[Mapping[Detail, tuple[Family, ...]]] = {
    "histogram": (
        Family(
            "maxact_magnitude_octave_ratio",
            "gauge",
            OCTAVES,
            "ratio",
            "Share of elements with a magnitude from octave to twice that (0: to 4.8e-07, 512: or more), of a sample "
            "of the last minutes",
            'maxact_magnitude_octave_ratio{layer="0",site="hidden"}',
        ),
    ),
    "rank": (
        Family(
            "maxact_rank_absmax",
            "gauge",
            RANK_PHASED,
            "activation",
            "Largest magnitude of one worker over the hold horizon",
            "max by (layer, site) (maxact_rank_absmax) / min by (layer, site) (maxact_rank_absmax)",
        ),
        Family(
            "maxact_rank_nonfinite_tokens_total",
            "counter",
            RANK_PHASED,
            "tokens",
            "Token rows of one worker holding a NaN or an infinity, since it started",
            "sum by (rank) (increase(maxact_rank_nonfinite_tokens_total[1h])) > 0",
        ),
    ),
}
"""Rendered behind `FAMILIES` for ``/metrics?detail=...`` only: every octave, every rank adds its series."""

OWN: Final = (
    Family(
        "maxact_build_info",
        "info",
        ("version",),
        "",
        "Version of this sidecar",
        "count by (version) (maxact_build_info)",
    ),
    Family(
        "maxact_windows_rejected_total",
        "counter",
        ("reason",),
        "messages",
        "Messages that broke the wire's limits",
        "sum by (reason) (increase(maxact_windows_rejected_total[1h])) > 0",
    ),
    Family(
        "maxact_windows_repeated_total",
        "counter",
        (),
        "windows",
        "Windows that had been merged before, acknowledged and left out",
        "increase(maxact_windows_repeated_total[1h])",
    ),
    Family(
        "maxact_window_lag_seconds",
        "histogram",
        (),
        "seconds",
        "Time from the end of a window, by the worker's clock, until it was merged",
        "histogram_quantile(0.99, sum by (le) (rate(maxact_window_lag_seconds_bucket[5m])))",
    ),
    Family(
        "maxact_ingest_seconds",
        "histogram",
        (),
        "seconds",
        "Time to decode, merge and judge one window",
        "rate(maxact_ingest_seconds_sum[5m]) / rate(maxact_ingest_seconds_count[5m])",
    ),
    Family(
        "maxact_render_seconds",
        "histogram",
        (),
        "seconds",
        "Time to render one scrape",
        "rate(maxact_render_seconds_sum[5m]) / rate(maxact_render_seconds_count[5m])",
    ),
    Family(
        "maxact_state_errors_total",
        "counter",
        (),
        "times",
        "Times that state could not be written to disk",
        "increase(maxact_state_errors_total[1h]) > 0",
    ),
    Family("maxact_series", "gauge", (), "series", "Series of the last scrape, without these", "sum(maxact_series)"),
    Family(
        "maxact_series_dropped_total",
        "counter",
        (),
        "series",
        "Series left out of scrapes by the series cap",
        "increase(maxact_series_dropped_total[10m]) > 0",
    ),
)
"""About the sidecar itself, beside what `prometheus_client` says of any process (CPU, memory, descriptors)."""


class SelfMetrics:
    """The metrics of `OWN`, in a registry of their own."""

    def __init__(self) -> None:
        # Series that say when a counter began double the scrape and answer nothing that a counter reset does not.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._make(Info, "maxact_build_info").info({"version": __version__})
        self.windows_rejected: Counter = self._make(Counter, "maxact_windows_rejected_total")
        self.windows_repeated: Counter = self._make(Counter, "maxact_windows_repeated_total")
        self.window_lag_seconds: Histogram = self._make(
            Histogram,
            "maxact_window_lag_seconds",
            buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0),
        )
        self.ingest_seconds: Histogram = self._make(
            Histogram, "maxact_ingest_seconds", buckets=(5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3, 2e-2, 0.1)
        )
        self.render_seconds: Histogram = self._make(
            Histogram, "maxact_render_seconds", buckets=(1e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5)
        )
        self.state_errors: Counter = self._make(Counter, "maxact_state_errors_total")
        self.series: Gauge = self._make(Gauge, "maxact_series")
        self.series_dropped: Counter = self._make(Counter, "maxact_series_dropped_total")
        ProcessCollector(registry=self.registry)

    def _make(self, kind: Any, name: str, **options: Any) -> Any:
        family = next(each for each in OWN if each.name == name)
        labels = () if family.type == "info" else family.labels
        return kind(name.removesuffix("_info"), family.help, labels, registry=self.registry, **options)
