"""Hop 6/9: dataclass <-> bytes, between stream and ingest; the only user of the generated messages.

Decoding is where foreign bytes become arrays, so every limit is enforced here: a message that breaks one raises
`WireError` naming the field, and the sidecar ends that stream. Values travel as one little-endian float32 ``bytes``
field: for 1,000 sites x 8 statistics that was measured 15 times cheaper than repeated floats and 40 times cheaper than
nested messages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from maxact_proto import stats
from maxact_proto.v1 import telemetry_pb2 as pb

MAX_SITES = 20_000
MAX_STRING = 512
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""gRPC limit of both ends: 20,000 sites x (3 phases x (5 + 2 + 2 x 2) + 64 bins) x 4 bytes are 7.8 MB."""

MAX_COUNT = 2**53
"""Counters are float64 in the end."""

_FLOAT32, _INT64 = np.dtype("<f4"), np.dtype("<i8")


Histogram = npt.NDArray[np.float32]
"""float32 ``[num_sites, stats.NUM_BINS]``: elements by magnitude, estimated from a sample, all phases together."""


class WireError(ValueError):
    """A message that does not keep the contract. ``field`` names the offender."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One observed tensor: ``name`` of ``stats.SITES`` in decoder layer ``layer`` (None: outside the layers)."""

    layer: int | None
    name: str
    width: int
    """Elements per token on this rank."""
    sharded: bool
    """True where tensor-parallel ranks hold slices that add up, False where each holds the whole."""
    module: str = ""
    """Module path in the served model, for people."""
    limit: float | None = None
    """Largest magnitude that the static scale of the served checkpoint represents; None without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Who a worker is and which sites its windows hold, in order."""

    model: str
    engine: str
    """The data-parallel rank unless the operator chose a name."""
    instance: str
    """Drawn anew by every vLLM start, shared by its workers."""
    sites: tuple[Site, ...]
    model_type: str = ""
    dtype: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    interval_seconds: float = 1.0
    vllm_version: str = ""
    maxact_version: str = ""

    @property
    def rank(self) -> str:
        """Name of the worker within its engine, for example ``pp0tp1``."""
        return f"pp{self.pp_rank}tp{self.tp_rank}"


@dataclass(kw_only=True, slots=True)
class Window:
    """Statistics of one time span of one worker. Seconds are wall clock since the epoch."""

    layout_id: int
    sequence: int
    start_seconds: float
    end_seconds: float
    tokens: tuple[int, ...]
    """Token rows that went through the model, per phase."""
    values: stats.Values
    """float32 ``[num_phases, num_sites, num_stats]``."""
    lifetime: stats.Values | None
    """float32 ``[num_phases, num_sites, 2]``: (max, min) since the worker started; in the first window of a stream."""
    coalesced: int = 0
    histogram: Histogram | None = None
    """Elements by magnitude since the last window that had one; None in most."""
    counts: stats.Counts | None = None
    """int64 ``[num_phases, num_sites, num_counts]``; None without tokens or static scales."""
    cached: int = 0
    """Tokens taken from the prefix cache: they were never computed."""
    acknowledge_later: bool = False
    """The acknowledgement of a later window covers this one."""

    @property
    def phases(self) -> slice:
        """From the first to the last phase with tokens: what is sent of ``values``, the others saw nothing."""
        seen = [phase for phase, count in enumerate(self.tokens) if count]
        return slice(seen[0], seen[-1] + 1) if seen else slice(0, 0)


def encode_layout(layout: Layout) -> pb.StreamRequest:
    """The first request of a stream."""
    message = pb.Layout(
        model=layout.model,
        engine=layout.engine,
        instance=layout.instance,
        tensor_parallel_rank=layout.tp_rank,
        tensor_parallel_size=layout.tp_size,
        pipeline_parallel_rank=layout.pp_rank,
        pipeline_parallel_size=layout.pp_size,
        dtype=layout.dtype,
        vllm_version=layout.vllm_version,
        maxact_version=layout.maxact_version,
        stats=[stat.name for stat in stats.STATS],
        phases=stats.PHASES,
        interval_seconds=layout.interval_seconds,
        model_type=layout.model_type,
        histogram_bins=stats.NUM_BINS,
    )
    for site in layout.sites:
        message.sites.add(
            layer=site.layer,
            name=site.name,
            width=site.width,
            sharded=site.sharded,
            module=site.module,
            limit=site.limit,
        )
    return pb.StreamRequest(layout=message)


def decode_layout(message: pb.Layout) -> Layout:
    """The `Layout` of a message. Raises `WireError` where it breaks a limit or speaks another table of statistics."""
    names = [stat.name for stat in stats.STATS]
    if list(message.stats) != names or list(message.phases) != list(stats.PHASES):
        raise WireError(
            "layout.stats",
            f"worker sends {list(message.stats)} x {list(message.phases)}, this sidecar reads {names} x "
            f"{list(stats.PHASES)}: run the same maxact version on both sides",
        )
    if message.histogram_bins != stats.NUM_BINS:
        raise WireError("layout.histogram_bins", f"{message.histogram_bins}, this sidecar reads {stats.NUM_BINS}")
    if not 0 < len(message.sites) <= MAX_SITES:
        raise WireError("layout.sites", f"{len(message.sites)} sites, allowed are 1 to {MAX_SITES}")
    if not (math.isfinite(message.interval_seconds) and message.interval_seconds > 0):
        raise WireError("layout.interval_seconds", f"{message.interval_seconds} is not a positive time")
    for field in ("model", "engine", "instance"):
        if not getattr(message, field):
            raise WireError(f"layout.{field}", "is empty")
    return Layout(
        model=_string("layout.model", message.model),
        engine=_string("layout.engine", message.engine),
        instance=_string("layout.instance", message.instance),
        sites=_decode_sites(message),
        model_type=_string("layout.model_type", message.model_type),
        dtype=_string("layout.dtype", message.dtype),
        tp_rank=message.tensor_parallel_rank,
        tp_size=message.tensor_parallel_size,
        pp_rank=message.pipeline_parallel_rank,
        pp_size=message.pipeline_parallel_size,
        interval_seconds=message.interval_seconds,
        vllm_version=_string("layout.vllm_version", message.vllm_version),
        maxact_version=_string("layout.maxact_version", message.maxact_version),
    )


def _decode_sites(message: pb.Layout) -> tuple[Site, ...]:
    sites = tuple(_decode_site(index, site) for index, site in enumerate(message.sites))
    known: set[tuple[int | None, str]] = set()
    for index, site in enumerate(sites):
        if (site.layer, site.name) in known:
            raise WireError(f"layout.sites[{index}]", f"{site.name} of layer {site.layer} is listed twice")
        known.add((site.layer, site.name))
    return sites


def _decode_site(index: int, site: pb.Site) -> Site:
    if site.name not in stats.SITES:
        raise WireError(f"layout.sites[{index}].name", f"{site.name[:MAX_STRING]!r} is not a known site")
    if site.width == 0:
        raise WireError(f"layout.sites[{index}].width", "is 0")
    if site.HasField("limit") and not (math.isfinite(site.limit) and site.limit > 0):
        raise WireError(f"layout.sites[{index}].limit", f"{site.limit} is not a positive magnitude")
    return Site(
        layer=site.layer if site.HasField("layer") else None,
        name=site.name,
        width=site.width,
        sharded=site.sharded,
        module=_string(f"layout.sites[{index}].module", site.module),
        limit=site.limit if site.HasField("limit") else None,
    )


def _string(field: str, value: str) -> str:
    if len(value) > MAX_STRING:
        raise WireError(field, f"{len(value)} characters, allowed are {MAX_STRING}")
    return value


def encode_window(window: Window) -> pb.StreamRequest:
    """Every later request of a stream."""
    return pb.StreamRequest(
        window=pb.Window(
            layout_id=window.layout_id,
            sequence=window.sequence,
            start_seconds=window.start_seconds,
            end_seconds=window.end_seconds,
            tokens=window.tokens,
            values=_columns(window.values[window.phases]),
            lifetime=b"" if window.lifetime is None else _columns(window.lifetime),
            coalesced=window.coalesced,
            histogram=b"" if window.histogram is None else window.histogram.astype(_FLOAT32).tobytes(),
            counts=b"" if window.counts is None else window.counts.astype(_INT64).tobytes(),
            cached=window.cached,
            acknowledge_later=window.acknowledge_later,
        )
    )


def _columns(values: stats.Values) -> bytes:
    """``[phases, sites, stats]`` one statistic after the other: what merges and checks them is several times faster."""
    return np.ascontiguousarray(values.transpose(2, 0, 1), _FLOAT32).tobytes()


def decode_window(message: pb.Window, num_sites: int) -> Window:
    """The `Window` of a message for a layout of ``num_sites``.

    Raises `WireError` where sizes differ from the layout, a time is not finite or a value cannot be.
    """
    if len(message.tokens) != len(stats.PHASES):
        raise WireError("window.tokens", f"{len(message.tokens)} counts for {len(stats.PHASES)} phases")
    if max(*message.tokens, message.coalesced, message.cached) > MAX_COUNT:
        raise WireError("window.tokens", f"a count is above {MAX_COUNT}")
    if not (math.isfinite(message.start_seconds) and math.isfinite(message.end_seconds)):
        raise WireError("window.start_seconds", f"[{message.start_seconds}, {message.end_seconds}] is not a time span")
    if message.sequence == 0:
        raise WireError("window.sequence", "is 0, counting starts at 1")
    window = Window(
        layout_id=message.layout_id,
        sequence=message.sequence,
        start_seconds=message.start_seconds,
        end_seconds=message.end_seconds,
        tokens=tuple(message.tokens),
        values=_NOTHING,
        lifetime=None,
        coalesced=message.coalesced,
        histogram=_histogram(message.histogram, num_sites) if message.histogram else None,
        counts=_counts(message.counts, num_sites) if message.counts else None,
        cached=message.cached,
        acknowledge_later=message.acknowledge_later,
    )
    columns = _array("window.values", message.values, len(stats.STATS), window.phases, num_sites)
    window.values = columns.transpose(1, 2, 0)
    if message.lifetime:
        extrema = _array("window.lifetime", message.lifetime, stats.NUM_EXTREMA, slice(0, len(stats.PHASES)), num_sites)
        window.lifetime = extrema.transpose(1, 2, 0)
    return window


def _counts(data: bytes, num_sites: int) -> stats.Counts:
    shape = (len(stats.PHASES), num_sites, len(stats.COUNTS))
    _check_size("window.counts", data, shape, _INT64)
    counts: stats.Counts = np.frombuffer(data, _INT64).reshape(shape)
    if not (counts.min() >= 0 and counts.max() <= MAX_COUNT):
        raise WireError("window.counts", f"holds a number that is no count up to {MAX_COUNT}")
    return counts


def _check_size(field: str, data: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise WireError(field, f"{len(data)} bytes, {expected} expected for shape {list(shape)}")


def _histogram(data: bytes, num_sites: int) -> Histogram:
    _check_size("window.histogram", data, (num_sites, stats.NUM_BINS), _FLOAT32)
    counts: Histogram = np.frombuffer(data, _FLOAT32).reshape(num_sites, stats.NUM_BINS)
    if not (counts.min() >= 0 and counts.max() < np.inf):
        raise WireError("window.histogram", "holds a NaN, an infinity or a negative count")
    return counts


def _array(field: str, data: bytes, num_columns: int, phases: slice, num_sites: int) -> npt.NDArray[np.float32]:
    """``[columns, phases, sites]`` of all phases from those that were sent."""
    shape = (num_columns, phases.stop - phases.start, num_sites)
    _check_size(field, data, shape, _FLOAT32)
    sent = np.frombuffer(data, _FLOAT32).reshape(shape)
    if sent.size:
        # False for a NaN too. A sum of squares may overflow to infinity; max and min begin at -inf and inf.
        possible = sent[stats.MAX].max() < np.inf and sent[stats.MIN].min() > -np.inf
        if not (possible and sent[stats.NUM_EXTREMA :].min(initial=0.0) >= 0):
            raise WireError(
                field, "holds a NaN" if np.isnan(sent).any() else "holds an infinite extremum or a negative sum"
            )
    if shape[1] == len(stats.PHASES):
        return sent
    columns = np.empty((num_columns, len(stats.PHASES), num_sites), np.float32)
    columns[:] = _IDENTITIES[:num_columns, None, None]
    columns[:, phases] = sent
    return columns


_NOTHING: Final = stats.empty(0)
_IDENTITIES: Final = stats.empty(1)[0, 0]
