"""From windows to an acknowledged stream, with a real gRPC server that goes away and comes back, or asks who we are."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import trustme
from certificates import install, issue
from processes import Sidecar, wait_for
from receiver import Listening
from workers import layout, window

from maxact_proto import stats
from maxact_vllm.config import Settings
from maxact_vllm.stream import MOST_UNDER_WAY, Outbox, Streamer

NUM_SITES = 3
TOKEN = "a-token-of-sufficient-length"
OTHER = "another-token-of-this-worker"


def test_windows_merge_while_no_more_may_be_under_way() -> None:
    outbox = Outbox(NUM_SITES)
    for _ in range(MOST_UNDER_WAY):
        outbox.put(window(0, 1.0))
        assert outbox.take(0) is not None
    for peak in (4.0, 2.0, 3.0):
        outbox.put(window(0, peak))
    assert outbox.take(0) is None
    assert [each.sequence for each in outbox.under_way()] == list(range(1, MOST_UNDER_WAY + 1))
    outbox.acknowledge(4)
    merged = outbox.take(0)
    assert merged.sequence == MOST_UNDER_WAY + 1
    assert merged.coalesced == 2
    assert merged.tokens == (0, 12, 0)
    assert (merged.values[stats.PREFILL, :, stats.MIN] == -4.0).all()
    assert merged.values[stats.PREFILL, 0, stats.SUM_ABS] == pytest.approx(4 * 64 * (4 + 2 + 3) / 8)


def test_every_fourth_window_asks_to_be_acknowledged_and_the_last_one_does() -> None:
    outbox = Outbox(NUM_SITES)
    asks = []
    for _ in range(MOST_UNDER_WAY + 1):
        outbox.put(window(0, 1.0))
        asks.append(not outbox.take(0).acknowledge_later)
        if asks[-1]:
            outbox.acknowledge(len(asks))
    assert asks == [False, False, False, True, False, False, False, True, False]
    assert not outbox.wait_until_sent(0)
    last = outbox.take(0)
    assert (last.sequence, last.tokens, last.acknowledge_later) == (len(asks) + 1, (0, 0, 0), False)
    outbox.acknowledge(last.sequence)
    assert outbox.wait_until_sent(0)


def test_the_first_window_of_a_stream_brings_the_lifetime_extrema() -> None:
    outbox = Outbox(NUM_SITES)
    first = Listening()
    with first:
        streamer = Streamer(Settings(endpoint=first.endpoint), layout(), outbox)
        streamer.start()
        for peak in (1.0, 5.0, 2.0):
            outbox.put(window(0, peak))
            assert outbox.wait_until_sent(10)
        before = first.receiver.windows["pp0tp0"]
    outbox.put(window(0, 3.0))
    with Listening(first.port) as second:
        assert outbox.wait_until_sent(20)
        streamer.stop()
        after = second.receiver.windows["pp0tp0"]
    for windows in (before, after):
        assert windows[0].lifetime is not None
        assert all(each.lifetime is None for each in windows[1:])


def test_an_hour_without_a_sidecar_keeps_the_extremum_and_every_small_window() -> None:
    outbox = Outbox(NUM_SITES)
    outbox.put(window(0, 1e4))
    for _ in range(3600):
        outbox.put(window(0, 1e-2))
    merged = outbox.take(0)
    assert merged.tokens == (0, 4 * 3601, 0)
    assert (merged.values[stats.PREFILL, :, stats.MIN] == -1e4).all()
    assert merged.values[stats.PREFILL, 0, stats.SUM_ABS] == pytest.approx(32 * (1e4 + 3600 * 1e-2), rel=1e-6)


def test_windows_reach_the_sidecar_in_order_and_are_acknowledged() -> None:
    outbox = Outbox(NUM_SITES)
    with Listening() as listening:
        streamer = Streamer(Settings(endpoint=listening.endpoint), layout(), outbox)
        streamer.start()
        for peak in (1.0, 2.0, 3.0):
            outbox.put(window(0, peak))
            assert outbox.wait_until_sent(10)
        streamer.stop()
        received = listening.receiver.windows["pp0tp0"]
    assert [each.sequence for each in received] == list(range(1, len(received) + 1))
    peaks = [-each.values[stats.PREFILL, 0, stats.MIN] for each in received if any(each.tokens)]
    assert peaks == [1.0, 2.0, 3.0]


def test_nothing_is_lost_or_counted_twice_when_the_sidecar_is_away() -> None:
    outbox = Outbox(NUM_SITES)
    first = Listening()
    with first:
        streamer = Streamer(Settings(endpoint=first.endpoint), layout(), outbox)
        streamer.start()
        outbox.put(window(0, 1.0))
        assert outbox.wait_until_sent(10)
    for peak in (9.0, 2.0):
        outbox.put(window(0, peak))
    time.sleep(0.5)
    with Listening(first.port) as second:
        assert outbox.wait_until_sent(20)
        streamer.stop()
        received = second.receiver.windows["pp0tp0"]
    assert sum(each.tokens[stats.PREFILL] for each in received) == 8
    assert min(each.values[stats.PREFILL, 0, stats.MIN] for each in received) == -9.0


def test_a_window_that_was_merged_but_not_acknowledged_keeps_its_sequence_number() -> None:
    outbox = Outbox(NUM_SITES)
    outbox.put(window(0, 1.0))
    sent = outbox.take(0)
    assert outbox.under_way() == [sent]
    outbox.acknowledge(sent.sequence)
    assert outbox.under_way() == []
    outbox.put(window(0, 2.0))
    np.testing.assert_array_equal(outbox.take(0).sequence, sent.sequence + 1)


def test_stopping_without_a_sidecar_is_quick() -> None:
    streamer = Streamer(Settings(endpoint="127.0.0.1:1"), layout(), Outbox(NUM_SITES))
    streamer.start()
    started = time.monotonic()
    streamer.stop()
    wait_for(lambda: not streamer.is_alive(), 5)
    assert time.monotonic() - started < 5


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the plugin logs, whatever vLLM made of its logger."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("vllm.maxact"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


@contextmanager
def streaming(settings: Settings) -> Iterator[Outbox]:
    outbox = Outbox(NUM_SITES)
    streamer = Streamer(settings, layout(), outbox)
    streamer.start()
    try:
        yield outbox
    finally:
        streamer.stop()


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[tuple[Sidecar, Settings]]:
    """A sidecar that asks for certificate and token, and the settings of a worker that has both."""
    authority, clients = trustme.CA(), trustme.CA()
    options = install(tmp_path, authority)
    clients.cert_pem.write_to_path(str(tmp_path / "clients.pem"))
    cert, key = issue(tmp_path, clients, "worker-", "worker")
    (tmp_path / "tokens").write_text(f"# old\n{TOKEN}\n{OTHER}\n")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    asks = ("--grpc-client-ca", str(tmp_path / "clients.pem"), "--grpc-token-file", str(tmp_path / "tokens"))
    sidecar = Sidecar(tmp_path / "log", *options, *asks)
    yield (
        sidecar,
        Settings(
            endpoint=sidecar.grpc,
            tls_ca=str(tmp_path / "ca.pem"),
            tls_cert=str(cert),
            tls_key=str(key),
            token_file=str(tmp_path / "token"),
        ),
    )
    sidecar.stop()


def merged_tokens(sidecar: Sidecar, ca: str) -> str:
    text = httpx.get(f"{sidecar.url}/metrics", verify=ssl.create_default_context(cafile=ca)).text
    (line,) = [line for line in text.splitlines() if line.startswith("maxact_tokens_total") and "prefill" in line]
    return line.split()[-1]


def test_a_worker_shows_certificate_and_token_and_those_that_replace_them(
    strict: tuple[Sidecar, Settings], tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    sidecar, settings = strict
    with streaming(settings) as outbox:
        outbox.put(window(0, 1.0))
        assert outbox.wait_until_sent(20)
        # The token is withdrawn, the worker's former authority too; it is given new ones meanwhile.
        clients = trustme.CA()
        issue(tmp_path, clients, "worker-", "worker")
        (tmp_path / "token").write_text(f"# rotated\n{OTHER}\n{TOKEN}\n")
        clients.cert_pem.write_to_path(str(tmp_path / "clients.pem"))
        (tmp_path / "tokens").write_text(f"{OTHER}\n")
        time.sleep(1.2)
        outbox.put(window(0, 2.0))
        assert outbox.wait_until_sent(30)
    assert merged_tokens(sidecar, settings.tls_ca) == "8.0"
    assert "UNAUTHENTICATED" in heard.text
    for secret in (TOKEN, OTHER, "PRIVATE KEY"):
        assert secret not in heard.text + sidecar.log.read_text()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"token_file": ""}, "UNAUTHENTICATED: a token of the sidecar's grpc_token_file is needed"),
        ({"token_file": "wrong"}, "UNAUTHENTICATED: a token of the sidecar's grpc_token_file is needed"),
        ({"token_file": "unfit"}, "SettingsError: maxact token_file: {}/unfit: its first token is not ASCII"),
        ({"token_file": "none"}, "SettingsError: maxact token_file: {}/none: No such file or directory"),
        ({"tls_cert": "", "tls_key": ""}, "UNAVAILABLE: "),
        ({"tls_ca": "clients.pem"}, "UNAVAILABLE: "),
        ({"tls_ca": "", "tls_cert": "", "tls_key": ""}, "UNAVAILABLE: "),
    ],
)
def test_a_worker_that_is_not_let_in_says_why_and_keeps_its_windows(
    strict: tuple[Sidecar, Settings],
    tmp_path: Path,
    heard: pytest.LogCaptureFixture,
    changes: dict[str, str],
    problem: str,
) -> None:
    sidecar, settings = strict
    (tmp_path / "wrong").write_text(f"{TOKEN}x\n")
    (tmp_path / "unfit").write_text(f"{TOKEN} {TOKEN}\n")
    placed = {name: value and str(tmp_path / value) for name, value in changes.items()}
    with streaming(replace(settings, **placed)) as outbox:
        outbox.put(window(0, 1.0))
        wait_for(lambda: "maxact has no sidecar" in heard.text, 20)
        assert not outbox.wait_until_sent(1)
    assert problem.replace("{}", str(tmp_path)) in heard.text
    assert TOKEN not in heard.text
    assert "maxact_engines 0" in httpx.get(f"{sidecar.url}/metrics", verify=False).text


def test_a_certificate_of_another_name_is_not_the_sidecars(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    sidecar = Sidecar(tmp_path / "log", *install(tmp_path, trustme.CA(), "elsewhere.example"))
    with streaming(Settings(endpoint=sidecar.grpc, tls_ca=str(tmp_path / "ca.pem"))) as outbox:
        outbox.put(window(0, 1.0))
        wait_for(lambda: "maxact has no sidecar" in heard.text, 20)
        assert not outbox.wait_until_sent(1)
    sidecar.stop()
