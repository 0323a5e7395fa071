"""What a sidecar costs: rendering, being scraped, taking in windows, a fleet. Everything on loopback, on this machine.

    python benchmarks/bench_sidecar.py [--fleet-seconds 60] [--skip scrape,fleet]

- render: 50,000 series as text, CPU of this process; beside it the same series as `prometheus_client` gauges.
- scrape: a real Prometheus scrapes a real sidecar with 50,000 series, gzipped; its own ``scrape_duration_seconds``.
- ingest: 8 streams of 1,000 sites with traffic in all three phases, 15 statistics per site; each asks for an
  acknowledgement with every fourth window, as the plugin does, and goes on when it has it. CPU of the sidecar process
  per window, median of three rounds. ``ingest_windows_per_s`` is what one core of it would take in,
  ``ingest_wall_windows_per_s`` what it took in while the clients shared the machine. Beside it the CPU of a gRPC server
  that parses and acknowledges the same windows and does nothing else (``ingest_bare_us``: the least that this library
  takes), of decoding one window, ours and the same numbers as nested protobuf messages, and of merging and judging one.
- fleet: 64 engines x 8 ranks x 1,000 sites at 1 Hz, one scrape every 15 s, state kept on disk. CPU of the sidecar in
  percent of one core (``fleet_core_pct``), its largest resident memory, by how much its last is above the median of the
  first half, and the time from sending a window that asks for it to its acknowledgement: the window is merged and
  judged then, and in every scrape that starts later (``window_to_metric_p99_ms``). As in a real fleet, one window in
  thirty has a histogram, at a time of its worker's own.

Last line: ``RESULT {"render_50k_ms": .., "render_50k_naive_ms": .., "scrape_50k_s": .., "ingest_windows_per_s": ..,
"ingest_wall_windows_per_s": .., "ingest_cpu_us": .., "ingest_bare_us": .., "decode_us": .., "decode_nested_us": ..,
"merge_us": .., "fleet_core_pct": .., "fleet_rss_mib": .., "fleet_growth_mib": .., "window_to_metric_p99_ms": ..}``;
keys only for parts that ran.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from prometheus_client import CollectorRegistry, Gauge, generate_latest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from processes import Sidecar, wait_for
from watchers import free_port

from maxact_proto import stats, wire
from maxact_proto.v1 import telemetry_pb2 as pb
from maxact_proto.v1 import telemetry_pb2_grpc
from maxact_sidecar.collector import Collector
from maxact_sidecar.config import make_settings
from maxact_sidecar.families import SelfMetrics
from maxact_sidecar.fleet import Fleet
from maxact_sidecar.ingest import clock

NUM_SERIES = 50_000
ACKNOWLEDGE_EVERY = 4  # maxact_vllm.stream
FLOODS = 3
HISTOGRAM_EVERY = 30  # of windows of a second, maxact_vllm.flush
PARTS = ("render", "scrape", "ingest", "fleet")
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Run the parts, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet-seconds", type=float, default=60.0)
    parser.add_argument("--skip", type=lambda text: text.split(","), default=[], help=f"of {', '.join(PARTS)}")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        asyncio.run(_acknowledge())
        return
    if args.load:
        print(json.dumps(asyncio.run(_send_load(**json.loads(args.load)))))
        return
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "render": measure_render,
        "scrape": measure_scrape,
        "ingest": measure_ingest,
        "fleet": lambda: measure_fleet(args.fleet_seconds),
    }
    result: dict[str, float] = {}
    for name in PARTS:
        if name not in args.skip:
            print(f"{name} ...", flush=True)
            result |= parts[name]()
    print("RESULT " + json.dumps({key: round(value, 3) for key, value in result.items()}), flush=True)


def measure_render() -> dict[str, float]:
    """CPU of one scrape, ours and the ordinary way."""
    settings = make_settings(max_series=NUM_SERIES)
    fleet, collector = Fleet(settings), Collector(settings, SelfMetrics())
    layout, window = _layout("0", 0, 2100), _window(2100)
    engine, rank = fleet.attach(layout)
    engine.merge_window(rank, window, clock())

    def render() -> bytes:
        return b"".join(collector.render(fleet.snapshots(clock()), [], as_openmetrics=False))

    num_series = sum(not line.startswith(b"#") for line in render().splitlines() if line.startswith(b"maxact_"))
    assert num_series >= NUM_SERIES, num_series
    registry = CollectorRegistry()
    gauge = Gauge("maxact_absmax", "absmax", ["model_name", "engine", "layer", "site", "phase"], registry=registry)
    for index in range(NUM_SERIES):
        gauge.labels("m", "0", str(index), "hidden", "prefill").set(index + 0.1)
    naive = _cpu_us(lambda: generate_latest(registry), repeat=5)
    return {"render_50k_ms": _cpu_us(render, repeat=15) / 1e3, "render_50k_naive_ms": naive / 1e3}


def _cpu_us(work: Callable[[], Any], *, repeat: int) -> float:
    """Median CPU of one call, in microseconds."""
    seconds = []
    for _ in range(repeat + 1):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds[1:]) * 1e6


def measure_scrape() -> dict[str, float]:
    """Prometheus' own figure for scraping 50,000 series."""
    with tempfile.TemporaryDirectory() as folder, _sidecar("--max-series", str(NUM_SERIES)) as sidecar:
        load = _start_load(sidecar.grpc, engines=1, ranks=1, num_sites=2100, interval=1.0, seconds=20.0)
        port = free_port()
        job = {"job_name": "maxact", "scrape_interval": "1s", "static_configs": [{"targets": [sidecar.http]}]}
        config = Path(folder) / "prometheus.yml"
        config.write_text(json.dumps({"scrape_configs": [job]}))
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/tsdb"]
        with subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL
        ) as watcher:
            load.communicate()
            seconds = _query(port, "quantile_over_time(0.5, scrape_duration_seconds[15s])")
            samples = _query(port, "scrape_samples_scraped")
            watcher.terminate()
        assert samples >= NUM_SERIES, samples
        return {"scrape_50k_s": seconds}


def _query(port: int, expr: str) -> float:
    answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": expr}).raise_for_status().json()
    return float(answer["data"]["result"][0]["value"][1])


def measure_ingest() -> dict[str, float]:
    """CPU of the sidecar per window, and what decoding is of that."""
    flood = {"engines": 8, "ranks": 1, "num_sites": 1000, "interval": 0.0, "seconds": 8.0}
    ours, bare, walls = [], [], []
    with _sidecar() as sidecar, _bare() as (server, address):
        for _ in range(FLOODS):
            cpu, wall = _flooded(sidecar.pid, sidecar.grpc, flood)
            ours.append(cpu)
            walls.append(wall)
            bare.append(_flooded(server.pid, address, flood)[0])
    print(f"  CPU per window {[round(1e6 * cpu) for cpu in ours]} us, bare {[round(1e6 * cpu) for cpu in bare]} us")
    cpu, bare_cpu = statistics.median(ours), statistics.median(bare)
    data = wire.encode_window(replace(_window(1000), lifetime=None)).SerializeToString()
    nested, nested_data = _nested(_window(1000))

    def decode_nested() -> Any:
        rows = nested.FromString(nested_data).rows
        return np.array([[row.max, row.min, row.sum_squares, row.sum_abs, row.nonfinite] for row in rows], np.float32)

    return {
        "ingest_windows_per_s": 1 / cpu,
        "ingest_wall_windows_per_s": statistics.median(walls),
        "ingest_cpu_us": cpu * 1e6,
        "ingest_bare_us": bare_cpu * 1e6,
        "decode_us": _cpu_us(lambda: wire.decode_window(pb.StreamRequest.FromString(data).window, 1000), repeat=500),
        "decode_nested_us": _cpu_us(decode_nested, repeat=50),
        "merge_us": _cpu_us(_merging(8), repeat=500),
    }


def _flooded(pid: int, address: str, flood: dict[str, float]) -> tuple[float, float]:
    """CPU seconds of a server per window, and windows per second."""
    before = _cpu_seconds(pid)
    load = _run_load(address, **flood)
    return (_cpu_seconds(pid) - before) / load["windows"], load["windows"] / load["seconds"]


@contextmanager
def _bare() -> Iterator[tuple[subprocess.Popen[str], str]]:
    with subprocess.Popen([sys.executable, __file__, "--bare"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            yield server, server.stdout.readline().strip()
        finally:
            server.terminate()


def _merging(engines: int) -> Callable[[], Any]:
    """Merges and judges the next window of one engine after another."""
    fleet = Fleet(make_settings())
    pairs = itertools.cycle([fleet.attach(_layout(str(engine), 0, 1000)) for engine in range(engines)])
    window = replace(_window(1000), lifetime=None)

    def merge() -> None:
        engine, rank = next(pairs)
        assert engine.merge_window(rank, replace(window, sequence=rank.last_sequence + 1), clock())

    return merge


class _Acknowledging(telemetry_pb2_grpc.TelemetryServiceServicer):
    async def Stream(self, requests: Any, context: Any) -> None:
        await context.read()
        await context.write(pb.StreamResponse(layout_accepted=pb.LayoutAccepted(layout_id=1)))
        while (request := await context.read()) is not grpc.aio.EOF:
            if not request.window.acknowledge_later:
                await context.write(pb.StreamResponse(window_ack=pb.WindowAck(sequence=request.window.sequence)))


async def _acknowledge() -> None:
    """A server that acknowledges; prints its address, runs until it is killed."""
    server = grpc.aio.server()
    telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server(_Acknowledging(), server)
    print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await server.wait_for_termination()


def _nested(window: wire.Window) -> tuple[Any, bytes]:
    """A message type with one nested message per row of statistics, and the window as such."""
    file = descriptor_pb2.FileDescriptorProto(name="nested.proto", package="nested", syntax="proto3")
    row = file.message_type.add(name="Row")
    for number, stat in enumerate(stats.STATS, start=1):
        row.field.add(name=stat.name, number=number, type=2, label=1)  # optional float
    whole = file.message_type.add(name="Window")
    whole.field.add(name="rows", number=1, type=11, label=3, type_name=".nested.Row")  # repeated Row
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName("nested.Window"))
    names = [stat.name for stat in stats.STATS]
    rows = window.values.reshape(-1, len(names)).tolist()
    data = message(rows=[dict(zip(names, values, strict=True)) for values in rows]).SerializeToString()
    return message, data


def measure_fleet(seconds: float) -> dict[str, float]:
    """64 engines x 8 ranks x 1,000 sites at 1 Hz."""
    with tempfile.TemporaryDirectory() as state, _sidecar("--state", state) as sidecar:
        load = _start_load(sidecar.grpc, engines=64, ranks=8, num_sites=1000, interval=1.0, seconds=seconds + 10)
        wait_for(lambda: _engines(sidecar) == 64, 60)
        time.sleep(5)
        started, before, memory = time.monotonic(), _cpu_seconds(sidecar.pid), [_rss_mib(sidecar.pid)]
        while time.monotonic() < started + seconds:
            httpx.get(f"{sidecar.url}/metrics", timeout=30).raise_for_status()
            memory.append(_rss_mib(sidecar.pid))
            time.sleep(max(0.0, min(15.0, started + seconds - time.monotonic())))
        share = (_cpu_seconds(sidecar.pid) - before) / (time.monotonic() - started)
        largest = _rss_mib(sidecar.pid, largest=True)
        figures = json.loads(load.communicate()[0])
    print(f"  {figures['windows']} windows in {figures['seconds']:.0f} s, ack p50 {figures['p50_ms']:.1f} ms")
    print(f"  memory behind each scrape {[round(mib) for mib in memory]} MiB")
    return {
        "fleet_core_pct": 100 * share,
        "fleet_rss_mib": largest,
        "fleet_growth_mib": memory[-1] - statistics.median(memory[: len(memory) // 2 + 1]),
        "window_to_metric_p99_ms": figures["p99_ms"],
    }


@contextmanager
def _sidecar(*options: str) -> Iterator[Sidecar]:
    with tempfile.TemporaryDirectory() as folder:
        running = Sidecar(Path(folder) / "log", *options)
        try:
            yield running
        finally:
            running.stop()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _rss_mib(pid: int, *, largest: bool = False) -> float:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmHWM" if largest else "VmRSS"].split()[0]) / 1024


def _engines(sidecar: Sidecar) -> int:
    models = httpx.get(f"{sidecar.url}/api/v1/models", timeout=30).raise_for_status().json()
    return sum(len(model["engines"]) for model in models)


def _start_load(address: str, **load: float) -> subprocess.Popen[str]:
    """Workers of a fleet in a process of their own; prints figures at its end."""
    command = [sys.executable, __file__, "--load", json.dumps({"address": address, **load})]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _run_load(address: str, **load: float) -> dict[str, float]:
    figures: dict[str, float] = json.loads(_start_load(address, **load).communicate()[0])
    return figures


async def _send_load(
    *, address: str, engines: int, ranks: int, num_sites: int, interval: float, seconds: float
) -> dict[str, float]:
    latencies: list[float] = []
    sent: list[int] = []
    started = time.monotonic()
    layouts = [_layout(str(engine), rank, num_sites, ranks) for engine in range(engines) for rank in range(ranks)]
    delays = np.random.default_rng(0).uniform(0, interval, len(layouts))
    await asyncio.gather(
        *(
            _stream(address, layout, delay, interval, started + seconds, latencies, sent)
            for layout, delay in zip(layouts, delays, strict=True)
        )
    )
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return {"windows": sum(sent), "seconds": time.monotonic() - started, "p50_ms": p50, "p99_ms": p99}


async def _stream(
    address: str,
    layout: wire.Layout,
    delay: float,
    interval: float,
    until: float,
    latencies: list[float],
    windows: list[int],
) -> None:
    """One worker: a window every ``interval`` seconds, or as fast as they are acknowledged."""
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own, as a process of its own would have
    async with grpc.aio.insecure_channel(address, options) as channel:
        call = telemetry_pb2_grpc.TelemetryServiceStub(channel).Stream()
        await call.write(wire.encode_layout(layout))
        layout_id = (await call.read()).layout_accepted.layout_id
        request = wire.encode_window(_window(len(layout.sites), layout_id))
        histogram = _histogram(len(layout.sites)) if interval else b""
        due = time.monotonic() + delay
        while due < until:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            sent = time.monotonic()
            request.window.acknowledge_later = request.window.sequence % ACKNOWLEDGE_EVERY != 0
            await call.write(request)
            if not request.window.acknowledge_later:
                assert (await call.read()).window_ack.sequence == request.window.sequence
                latencies.append(time.monotonic() - sent)
            request.window.sequence += 1
            request.window.lifetime = b""  # only a stream's first window has it
            has_histogram = (request.window.sequence + round(1000 * delay)) % HISTOGRAM_EVERY == 0
            request.window.histogram = histogram if has_histogram else b""
            due = max(due + interval, sent)
        windows.append(request.window.sequence - 1)
        await call.done_writing()


def _layout(engine: str, rank: int, num_sites: int, ranks: int = 1) -> wire.Layout:
    names = [name for name in stats.SITES if name not in ("embedding", "final_norm")]
    sites = tuple(
        wire.Site(layer=index // len(names), name=names[index % len(names)], width=4096, sharded=index % 2 == 0)
        for index in range(num_sites)
    )
    return wire.Layout(model="m", engine=engine, instance=f"i{engine}", sites=sites, tp_rank=rank, tp_size=ranks)


def _histogram(num_sites: int) -> bytes:
    """Of normally distributed activations, for a thousand elements per site."""
    drawn = np.abs(np.random.default_rng(0).normal(size=1000))
    counts, _ = np.histogram(drawn, [0.0, *stats.BIN_EDGES[1:], np.inf])
    return np.tile(counts.astype("<f4"), num_sites).tobytes()


def _window(num_sites: int, layout_id: int = 0) -> wire.Window:
    values = np.abs(np.random.default_rng(0).normal(size=(len(stats.PHASES), num_sites, len(stats.STATS))))
    values[..., stats.MIN] *= -1
    values[..., stats.NONFINITE] = 0
    return wire.Window(
        layout_id=layout_id,
        sequence=1,
        start_seconds=time.time(),
        end_seconds=time.time(),
        tokens=(8, 512, 64),
        values=values.astype(np.float32),
        lifetime=values[..., : stats.NUM_EXTREMA].astype(np.float32),
    )


if __name__ == "__main__":
    main()
