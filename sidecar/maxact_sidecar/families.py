"""Hop 8/9: the catalogue of metrics. Names, types and labels are an interface: dashboards and alerts hang on them.

`FAMILIES` holds what `collector` renders from snapshots. Metrics about the sidecar itself are few and go through
`prometheus_client` (`SelfMetrics`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from maxact_sidecar import __version__

SITE: Final = ("model_name", "engine", "layer", "site")
PHASED: Final = (*SITE, "phase")
JUDGED: Final = (*SITE, "meaning")
RANK: Final = ("model_name", "engine", "rank")
ENGINE: Final = ("model_name", "engine")


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: what its series mean."""

    name: str
    type: Literal["gauge", "counter"]
    labels: tuple[str, ...]
    unit: str
    help: str

    @property
    def format(self) -> str:
        """Of a value: nine digits hold every float32 and take a third of the time; counts and times need more."""
        return "%.9g" if self.unit in ("activation", "ratio", "dB") else "%r"


FAMILIES: Final = (
    Family("maxact_engines", "gauge", (), "", "Engines whose series are shown"),
    Family("maxact_rank_up", "gauge", RANK, "", "1 while the worker's stream is connected, else 0"),
    Family(
        "maxact_rank_last_window_timestamp_seconds",
        "gauge",
        RANK,
        "seconds",
        "When the worker's last window arrived",
    ),
    Family("maxact_windows_total", "counter", ENGINE, "windows", "Windows merged"),
    Family("maxact_windows_coalesced_total", "counter", ENGINE, "windows", "Windows merged by workers while unsent"),
    Family("maxact_tokens_total", "counter", (*ENGINE, "phase"), "tokens", "Token rows that went through the model"),
    Family("maxact_card_info", "gauge", ("model_name", "card", "bos"), "", "1 for each calibration card in use"),
    Family(
        "maxact_headroom_threshold_ratio",
        "gauge",
        ("meaning",),
        "ratio",
        "A flag is raised when the headroom ratio falls below this",
    ),
    Family("maxact_headroom_flag", "gauge", JUDGED, "", "1 while the headroom flag is raised, else 0"),
    Family(
        "maxact_headroom_flag_since_timestamp_seconds",
        "gauge",
        JUDGED,
        "seconds",
        "When the flag was raised; only while it is",
    ),
    Family("maxact_headroom_ratio", "gauge", JUDGED, "ratio", "Limit / absmax over the hold horizon; < 1: beyond it"),
    Family("maxact_headroom_limit", "gauge", JUDGED, "activation", "Limit that the site is judged against"),
    Family(
        "maxact_int8_zeroed_ratio",
        "gauge",
        SITE,
        "ratio",
        "Share of elements that round to zero at the INT-8 scale absmax / 127, estimated from a sample",
    ),
    Family(
        "maxact_int8_sqnr_db",
        "gauge",
        SITE,
        "dB",
        "Signal to quantization noise of INT-8 at the scale absmax / 127, estimated from a sample",
    ),
    Family("maxact_nonfinite_tokens_total", "counter", PHASED, "tokens", "Token rows holding a NaN or an infinity"),
    Family("maxact_absmax", "gauge", PHASED, "activation", "Largest magnitude over the hold horizon"),
    Family("maxact_absmax_high_water", "gauge", PHASED, "activation", "Largest magnitude ever seen"),
    Family("maxact_max", "gauge", PHASED, "activation", "Largest signed value over the hold horizon"),
    Family("maxact_min", "gauge", PHASED, "activation", "Smallest signed value over the hold horizon"),
    Family("maxact_rms", "gauge", PHASED, "activation", "Root mean square over the hold horizon"),
    Family("maxact_mean_abs", "gauge", PHASED, "activation", "Mean magnitude over the hold horizon"),
    Family("maxact_crest_ratio", "gauge", PHASED, "ratio", "Crest factor absmax / rms over the hold horizon"),
)
"""What is rendered from snapshots, in this order: where the series cap cuts, it cuts from the end."""


class SelfMetrics:
    """Metrics about the sidecar itself, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        Info("maxact_build", "Version of this sidecar", registry=registry).info({"version": __version__})
        self.windows_rejected = Counter(
            "maxact_windows_rejected", "Messages that broke the wire's limits", ["reason"], registry=registry
        )
        self.ingest_seconds = Histogram(
            "maxact_ingest_seconds",
            "Time to decode, merge and judge one window",
            buckets=(5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3, 2e-2, 0.1),
            registry=registry,
        )
        self.render_seconds = Histogram(
            "maxact_render_seconds",
            "Time to render one scrape",
            buckets=(1e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5),
            registry=registry,
        )
        self.state_errors = Counter(
            "maxact_state_errors", "Times that state could not be written to disk", registry=registry
        )
        self.series = Gauge("maxact_series", "Series of the last scrape, without these", registry=registry)
        self.series_dropped = Counter(
            "maxact_series_dropped", "Series left out of scrapes by the series cap", registry=registry
        )
