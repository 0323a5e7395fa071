"""The sidecar as a process: streams, scrapes, API and command line over real sockets."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import stat
import subprocess
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from processes import Sidecar, program, wait_for
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from watchers import free_port
from workers import MODEL, SITES, Worker, layout, window

from maxact_proto import stats
from maxact_sidecar.families import DETAIL, FAMILIES, OWN, PHASED

GOLDEN = Path(__file__).with_name("metrics.txt")


def test_a_scrape_is_byte_for_byte_what_it_was(patient_sidecar: Sidecar) -> None:
    worker = patient_sidecar.connect(layout(model='odd "model"\\path'))
    worker.send([1.5, 2e4, 3.25])
    bulk = [
        line
        for line in patient_sidecar.scrape().splitlines()
        if "timestamp" not in line and not line.startswith(("maxact_ingest", "maxact_render", "maxact_series"))
    ]
    text = "\n".join(bulk[: next(index for index, line in enumerate(bulk) if "maxact_build_info" in line)]) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize(
    ("accept", "parse"),
    [("text/plain", parse_text), ("application/openmetrics-text; version=1.0.0", parse_openmetrics)],
)
def test_prometheus_own_parsers_read_every_series(patient_sidecar: Sidecar, accept: str, parse: Any) -> None:
    patient_sidecar.connect().send([1.5, 2e4, 3.25])
    families = {family.name: family for family in parse(patient_sidecar.scrape(accept))}
    absmax = {
        (sample.labels.get("layer", ""), sample.labels["site"]): sample.value
        for sample in families["maxact_absmax"].samples
    }
    assert absmax == {("", "embedding"): 1.5, ("0", "hidden"): 2e4, ("0", "down_proj_input"): 3.25}
    assert families["maxact_tokens"].type == "counter"
    assert {sample.labels["phase"]: sample.value for sample in families["maxact_tokens"].samples}["prefill"] == 4


@pytest.fixture
def busy_sidecar(patient_sidecar: Sidecar) -> Sidecar:
    """One whose scrape has every family: two ranks, odd names, scales, a histogram, a card, a flag, a refusal."""
    scaled = tuple(replace(site, limit=4.0) if site.name == "down_proj_input" else site for site in SITES)
    histogram = np.ones((len(SITES), stats.NUM_BINS), np.float32)
    histogram[:, 0] = 1e6  # next to nothing but for the rest: a flag of resolution
    counts = np.ones((len(stats.PHASES), len(SITES), len(stats.COUNTS)), np.int64)
    own = layout(model='odd "model"\\path\n%s', sites=scaled, tp_size=2)
    for rank, peaks in enumerate(([1.5, 6e4, 3.25], [1.5, 6e4, 7.0])):
        worker = patient_sidecar.connect(replace(own, tp_rank=rank))
        worker.send(peaks, histogram=histogram, counts=counts)
    patient_sidecar.use_live_state_as_card()
    with pytest.raises(grpc.RpcError):
        worker.send_raw(window(2, 1.0, layout_id=99))
    return patient_sidecar


@pytest.mark.parametrize(
    ("accept", "parse"),
    [("text/plain", parse_text), ("application/openmetrics-text; version=1.0.0", parse_openmetrics)],
)
def test_a_scrape_of_everything_is_valid_in_both_formats(busy_sidecar: Sidecar, accept: str, parse: Any) -> None:
    families = {family.name: family for family in parse(busy_sidecar.scrape(accept, detail=[*DETAIL]))}
    for family in chain(FAMILIES, *DETAIL.values(), OWN):
        named = family.name.removesuffix("_total").removesuffix("_info")
        read = families.get(family.name) or families[named]
        assert read.samples, family.name
        if family.type != "info":
            assert read.type == family.type
        assert {label for sample in read.samples for label in sample.labels} - {"le"} == set(family.labels)
    labels = [sample.labels for family in families.values() for sample in family.samples]
    assert {each["model_name"] for each in labels if "model_name" in each} == {'odd "model"\\path\n%s'}
    assert not [name for name in families if name.endswith("_created")]


def test_the_ranks_of_a_scrape_in_detail_are_told_apart(busy_sidecar: Sidecar) -> None:
    assert "maxact_rank_absmax{" not in busy_sidecar.scrape()
    [family] = [
        family for family in parse_text(busy_sidecar.scrape(detail="rank")) if family.name == "maxact_rank_absmax"
    ]
    absmax = {(sample.labels["rank"], sample.labels["site"]): sample.value for sample in family.samples}
    assert absmax == {
        **{("pp0tp0", "embedding"): 1.5, ("pp0tp0", "hidden"): 6e4, ("pp0tp0", "down_proj_input"): 3.25},
        **{("pp0tp1", "embedding"): 1.5, ("pp0tp1", "hidden"): 6e4, ("pp0tp1", "down_proj_input"): 7.0},
    }
    assert httpx.get(f"{busy_sidecar.url}/metrics", params={"detail": "site"}).status_code == 422


def test_a_scrape_has_the_shape_of_every_site_for_those_who_ask(patient_sidecar: Sidecar) -> None:
    worker = patient_sidecar.connect()
    histogram = np.zeros((len(SITES), stats.NUM_BINS), np.float32)
    for magnitude, elements in {0.26: 3, 0.4: 2, 1.5: 15}.items():
        histogram[1, np.searchsorted(stats.BIN_EDGES, magnitude, side="right") - 1] = elements
    histogram[2, [0, -1]] = 1
    worker.send(1.0, histogram=histogram)
    assert "maxact_magnitude_octave_ratio" not in patient_sidecar.scrape(detail="rank")
    [family] = [
        family
        for family in parse_text(patient_sidecar.scrape(detail="histogram"))
        if family.name == "maxact_magnitude_octave_ratio"
    ]
    shares: dict[str, dict[float, float]] = {}
    for sample in family.samples:
        shares.setdefault(sample.labels["site"], {})[float(sample.labels["octave"])] = sample.value
    assert shares["hidden"] == {0.25: 0.25, 0.5: 0.0, 1.0: 0.75}
    assert len(shares["down_proj_input"]) == stats.NUM_BINS // 2
    assert {octave: share for octave, share in shares["down_proj_input"].items() if share} == {0.0: 0.5, 512.0: 0.5}
    assert "embedding" not in shares


def test_details_are_what_the_series_cap_cuts_first(tmp_path: Path) -> None:
    histogram = np.ones((len(SITES), stats.NUM_BINS), np.float32)
    sidecar = Sidecar(tmp_path / "log", "--max-series", "70")
    try:
        sidecar.connect().send(1.0, histogram=histogram)
        plain, detailed = (sidecar.scrape(**asked) for asked in ({}, {"detail": [*DETAIL]}))
    finally:
        sidecar.stop()
    plain_lines = [line for line in plain.splitlines() if line.startswith("maxact_crest_ratio")]
    assert len(plain_lines) == len(SITES)
    assert all(line in detailed for line in plain_lines)
    assert "maxact_magnitude_octave_ratio{" in detailed
    assert "maxact_rank_absmax{" not in detailed


def test_lag_and_repeated_windows_are_measured(sidecar: Sidecar) -> None:
    worker = sidecar.connect()
    now = time.time()
    worker.send(1.0, start_seconds=now - 4, end_seconds=now - 3)
    worker.send(1.0, start_seconds=now + 3600, end_seconds=now + 3601)  # a clock that is ahead
    again = window(2, 1.0, layout_id=worker.layout_id)
    worker.send_raw(again)
    samples = {line.split()[0]: float(line.split()[1]) for line in sidecar.scrape().splitlines() if line[0] != "#"}
    assert samples["maxact_window_lag_seconds_count"] == 2
    assert samples['maxact_window_lag_seconds_bucket{le="0.005"}'] == 1
    assert 3 <= samples["maxact_window_lag_seconds_sum"] < 10
    assert samples["maxact_windows_repeated_total"] == 1
    assert samples["maxact_ingest_seconds_count"] == 3
    assert samples["process_resident_memory_bytes"] > 2**24


@pytest.mark.server
def test_promtool_finds_nothing_to_say_about_the_metrics(busy_sidecar: Sidecar) -> None:
    text = busy_sidecar.scrape(detail=[*DETAIL])
    linted = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert (linted.returncode, linted.stderr) == (0, "")


def test_a_scrape_is_compressed_for_those_who_ask(sidecar: Sidecar) -> None:
    sidecar.connect().send(1.0)
    with httpx.stream("GET", f"{sidecar.url}/metrics", headers={"accept-encoding": "gzip"}) as response:
        body = b"".join(response.iter_raw())
    assert response.headers["content-encoding"] == "gzip"
    assert b"maxact_absmax{" in gzip.decompress(body)
    plain = httpx.get(f"{sidecar.url}/metrics", headers={"accept-encoding": "gzip;q=0"})
    assert "content-encoding" not in plain.headers


def test_nothing_is_shown_about_phases_that_saw_no_token(sidecar: Sidecar) -> None:
    sidecar.connect().send(1.0)
    phased = [family.name for family in FAMILIES if family.labels == PHASED]
    shown = [line for line in sidecar.scrape().splitlines() if line.startswith(tuple(f"{name}{{" for name in phased))]
    assert shown
    assert all('phase="prefill"' in line for line in shown)


def test_the_series_cap_drops_and_counts(tmp_path: Path) -> None:
    sidecar = Sidecar(tmp_path / "log", "--max-series", "10")
    try:
        sidecar.connect().send(1.0)
        sidecar.scrape()
        text = sidecar.scrape()
    finally:
        sidecar.stop()
    samples = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    assert samples["maxact_series"] == 10
    assert samples["maxact_series_dropped_total"] > 10


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda own: own.values.fill(float("nan")), "window.values"),
        (lambda own: setattr(own, "layout_id", 99), "window.layout_id"),
    ],
)
def test_a_window_that_breaks_the_contract_ends_its_stream_and_is_counted(
    sidecar: Sidecar, spoil: Any, reason: str
) -> None:
    worker = sidecar.connect()
    own = window(1, 1.0, layout_id=worker.layout_id)
    spoil(own)
    with pytest.raises(grpc.RpcError) as raised:
        worker.send_raw(own)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.details().startswith(reason)
    assert f'maxact_windows_rejected_total{{reason="{reason}"}} 1.0' in sidecar.scrape()


def test_ranks_and_models_are_listed(sidecar: Sidecar) -> None:
    sidecar.connect().send(1.0)
    [model] = sidecar.get("models")
    [engine] = model["engines"]
    assert (model["model"], engine["sites"], engine["tokens"]["prefill"]) == (MODEL, 3, 4)
    [rank] = engine["ranks"]
    assert (rank["rank"], rank["connected"], rank["windows"]) == ("pp0tp0", True, 1)
    assert abs(rank["last_window_seconds"] - time.time()) < 10


def test_a_worker_that_left_is_shown_as_down(sidecar: Sidecar) -> None:
    worker = sidecar.connect()
    worker.send(1.0)
    worker.close()
    down = f'maxact_rank_up{{model_name="{MODEL}",engine="0",rank="pp0tp0"}} 0.0'
    wait_for(lambda: down in sidecar.scrape(), 10)


def test_a_card_is_saved_loaded_and_judged_from_the_command_line(sidecar: Sidecar, tmp_path: Path) -> None:
    worker = sidecar.connect()
    worker.send([1.0, 10.0, 2.0])
    card = tmp_path / "card.json"
    saved = maxact("card", sidecar.url, "--output", str(card))
    assert saved.stdout == f"{card}: {MODEL}, 3 sites, 4 tokens\n"
    loaded = maxact("card", sidecar.url, "--load", str(card))
    assert loaded.stdout == f"{card}: {MODEL}, 3 sites are judged against it\n"
    worker.send([1.0, 30.0, 2.0])
    [flag] = [flag for flag in sidecar.get("flags") if flag["active"]]
    assert (flag["layer"], flag["site"], flag["meaning"]) == (0, "hidden", "range")
    assert flag["headroom_ratio"] == pytest.approx(1 / 3)
    assert "flag raised meaning=range" in sidecar.log.read_text()


def test_a_card_given_at_start_is_used(sidecar: Sidecar, tmp_path: Path) -> None:
    sidecar.connect().send([1.0, 10.0, 2.0])
    card = tmp_path / "card.json"
    card.write_text(json.dumps(sidecar.get("card")))
    second = Sidecar(tmp_path / "second.log", "--card", str(card))
    try:
        second.connect().send([1.0, 30.0, 2.0])
        assert [flag["site"] for flag in second.get("flags")] == ["hidden"]
    finally:
        second.stop()


def test_a_bad_card_is_refused_with_its_field(sidecar: Sidecar, tmp_path: Path) -> None:
    sidecar.connect().send(1.0)
    card = sidecar.get("card")
    card["sites"][1]["absmax"] = -3
    answer = httpx.post(f"{sidecar.url}/api/v1/cards", json=card)
    assert answer.status_code == 422
    assert "absmax" in answer.text
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(card))
    failed = maxact("card", sidecar.url, "--load", str(path))
    assert (failed.returncode, failed.stdout) == (2, "")
    assert f"{path}: sites[1].absmax" in failed.stderr


def test_asking_for_a_card_before_any_token_says_what_is_missing(sidecar: Sidecar, tmp_path: Path) -> None:
    failed = maxact("card", sidecar.url, "--output", str(tmp_path / "card.json"))
    assert (failed.returncode, failed.stderr) == (2, f"error: {sidecar.url}: no engine has connected yet\n")
    sidecar.connect()
    failed = maxact("card", sidecar.url, "--output", str(tmp_path / "card.json"))
    assert failed.stderr == f"error: {sidecar.url}: {MODEL}: no tokens seen yet; send a request first\n"


def maxact(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("maxact"), *arguments], capture_output=True, text=True)


def sidecar_error(*arguments: str) -> str:
    done = maxact("sidecar", "--grpc", f"127.0.0.1:{free_port()}", "--http", f"127.0.0.1:{free_port()}", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--grpc", "nonsense"), "grpc: 'nonsense' is not an address"),
        (("--http", "0.0.0.0:9471"), "http: 0.0.0.0:9471 can be reached from other machines"),
        (("--hold", "0"), "hold: "),
        (("--card", "/nowhere/card.json"), "/nowhere/card.json: No such file or directory"),
        (("--grpc", "unix:/nowhere/socket"), "unix:/nowhere/socket: the folder /nowhere does not exist"),
    ],
)
def test_bad_settings_end_with_one_line_that_names_the_field(arguments: tuple[str, ...], message: str) -> None:
    assert sidecar_error(*arguments).startswith(f"error: {message}")


def test_a_card_that_is_no_json_is_refused_with_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text('{"schema": 1,\n oops}')
    assert f"{path}: Invalid JSON: key must be a string at line 2 column 2" in sidecar_error("--card", str(path))


@pytest.mark.parametrize("which", ["grpc", "http"])
def test_a_taken_port_is_a_clear_error(which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"{which}: cannot listen on {address}" in sidecar_error(f"--{which}", address)


def test_unix_sockets_are_private_and_gone_afterwards(tmp_path: Path) -> None:
    own = [tmp_path / "grpc.sock", tmp_path / "http.sock"]
    command = [program("maxact"), "sidecar", "--grpc", f"unix:{own[0]}", "--http", f"unix:{own[1]}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: all(path.exists() for path in own), 20)
        assert [stat.S_IMODE(path.stat().st_mode) for path in own] == [0o700, 0o700]
        worker = Worker(f"unix:{own[0]}")
        worker.send(5.0)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(own[1]))) as client:
            assert client.get("http://sidecar/api/v1/models").json()[0]["model"] == MODEL
        worker.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert not any(path.exists() for path in own)


def test_ports_left_to_the_system_are_named_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [program("maxact"), "sidecar", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    with log.open("wb") as file, subprocess.Popen(command, stderr=file) as process:
        wait_for(lambda: "sidecar ready" in log.read_text(), 20)
        message = json.loads(log.read_text().splitlines()[0])["message"]
        found = dict(part.split("=", 1) for part in message.split()[2:])
        worker = Worker(found["grpc"])
        worker.send(1.0)
        assert "maxact_absmax" in httpx.get(found["metrics"]).text
        worker.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_series_of_an_engine_that_left_vanish(tmp_path: Path) -> None:
    sidecar = Sidecar(tmp_path / "log", "--stale", "0.5")
    try:
        worker = sidecar.connect()
        worker.send(1.0)
        assert 'engine="0"' in sidecar.scrape()
        worker.close()
        wait_for(lambda: 'engine="0"' not in sidecar.scrape(), 10)
    finally:
        sidecar.stop()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1", "no sidecar answers there (Connection refused)"),
        ("unix:/nowhere/socket", "no sidecar answers there (No such file or directory)"),
        ("127.0.0.1:9471", "is not a URL"),
        ("ftp://127.0.0.1", "is not a URL"),
    ],
)
def test_a_sidecar_that_is_not_there_is_one_clear_line(url: str, message: str, tmp_path: Path) -> None:
    failed = maxact("card", url, "--output", str(tmp_path / "card.json"))
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith(f"error: {url}: {message}")
    assert failed.stderr.count("\n") == 1


def test_something_else_at_the_address_is_named_as_such(sidecar: Sidecar, tmp_path: Path) -> None:
    card = str(tmp_path / "card.json")
    assert "no sidecar answers there" in maxact("card", f"http://{sidecar.grpc}", "--output", card).stderr
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever).start()
        failed = maxact("card", f"http://127.0.0.1:{other.server_port}", "--output", card)
        other.shutdown()
    assert "HTTP 501, is this a maxact sidecar?" in failed.stderr


def test_a_card_is_saved_through_a_unix_socket(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'http.sock'}"
    command = [program("maxact"), "sidecar", "--grpc", f"unix:{tmp_path / 'grpc.sock'}", "--http", address]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: (tmp_path / "grpc.sock").exists(), 20)
        worker = Worker(f"unix:{tmp_path / 'grpc.sock'}")
        worker.send(5.0)
        saved = maxact("card", address, "--output", str(tmp_path / "card.json"))
        assert saved.stdout.endswith("3 sites, 4 tokens\n"), saved.stderr
        worker.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_it_stops_within_seconds_with_a_worker_connected(sidecar: Sidecar) -> None:
    sidecar.connect().send(1.0)
    started = time.monotonic()
    sidecar._process.send_signal(signal.SIGINT)
    assert sidecar._process.wait(10) == 0
    assert time.monotonic() - started < 5


def test_a_card_is_added_from_the_command_line(sidecar: Sidecar, tmp_path: Path) -> None:
    sidecar.connect().send([1.0, 10.0, 2.0])
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps(sidecar.get("card")))
        maxact("card", sidecar.url, "--load", str(tmp_path / f"{name}.json"), "--add").check_returncode()
    assert [card["name"] for card in sidecar.get("cards")] == ["one", "two"]
