"""Streams that are not what they should be, over real gRPC."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from processes import Sidecar, wait_for
from workers import SITES, Worker, layout, window

from maxact_proto import wire
from maxact_proto.v1 import telemetry_pb2 as pb
from maxact_proto.v1 import telemetry_pb2_grpc


def tokens(sidecar: Sidecar) -> int:
    [model] = sidecar.get("models")
    total: int = model["engines"][0]["tokens"]["prefill"]
    return total


def refusal(sidecar: Sidecar, *requests: pb.StreamRequest) -> tuple[grpc.StatusCode, str]:
    """How a stream of these requests ends."""
    with grpc.insecure_channel(sidecar.grpc) as channel:
        stub = telemetry_pb2_grpc.TelemetryServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            list(stub.Stream(iter(requests), timeout=30))
    return raised.value.code(), raised.value.details()


def test_a_second_stream_of_a_worker_ends_the_first_and_counts_nothing_twice(sidecar: Sidecar) -> None:
    first = sidecar.connect()
    first.send(1.0)
    second = sidecar.connect()
    assert second.sequence == 1
    with pytest.raises(StopIteration):
        first.send(9.0)
    second.send(9.0)
    assert tokens(sidecar) == 8


def test_a_resent_window_is_acknowledged_and_not_counted_again(sidecar: Sidecar) -> None:
    worker = sidecar.connect()
    own = window(1, 1.0, layout_id=worker.layout_id)
    worker.send_raw(own)
    worker.send_raw(own)
    assert tokens(sidecar) == 4


def test_windows_that_do_not_ask_are_merged_and_covered_by_the_next_acknowledgement(sidecar: Sidecar) -> None:
    worker = sidecar.connect()
    for sequence in (1, 2):
        worker.post(window(sequence, 1.0, layout_id=worker.layout_id, acknowledge_later=True, lifetime=None))
    worker.send_raw(window(3, 5.0, layout_id=worker.layout_id, lifetime=None))  # the first answer is for this one
    assert tokens(sidecar) == 12
    assert {site["absmax_high_water"] for site in sidecar.get("sites")} == {5.0}


def test_a_worker_that_was_away_keeps_its_place(sidecar: Sidecar) -> None:
    first = sidecar.connect()
    first.send(1.0)
    first.close()
    wait_for(lambda: not sidecar.get("models")[0]["engines"][0]["ranks"][0]["connected"], 10)
    again = sidecar.connect()
    again.send(2.0, coalesced=5)
    [rank] = sidecar.get("models")[0]["engines"][0]["ranks"]
    assert (rank["connected"], rank["windows"], rank["coalesced"]) == (True, 2, 5)


def test_a_stream_that_starts_with_a_window_is_refused(sidecar: Sidecar) -> None:
    code, details = refusal(sidecar, wire.encode_window(window(1, 1.0)))
    assert (code, details.split(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, "layout")
    assert 'maxact_windows_rejected_total{reason="layout"} 1.0' in sidecar.scrape()


def test_a_second_layout_on_a_stream_is_refused(sidecar: Sidecar) -> None:
    code, details = refusal(sidecar, *[wire.encode_layout(layout())] * 2)
    assert (code, details.split(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, "window")


def test_a_worker_of_another_version_is_told_what_to_do(sidecar: Sidecar) -> None:
    request = wire.encode_layout(layout())
    request.layout.stats.append("kurtosis")
    code, details = refusal(sidecar, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "run the same maxact version on both sides" in details
    assert "stream rejected" in sidecar.log.read_text()


def test_a_message_above_the_limit_is_refused(sidecar: Sidecar) -> None:
    request = wire.encode_window(window(1, 1.0))
    request.window.values = b"\0" * (wire.MAX_MESSAGE_BYTES + 1)
    code, _ = refusal(sidecar, wire.encode_layout(layout()), request)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_more_streams_than_allowed_are_refused_and_those_that_are_served_go_on(tmp_path: Path) -> None:
    sidecar = Sidecar(tmp_path / "log", "--max-streams", "1")
    try:
        worker = sidecar.connect()
        code, details = refusal(sidecar, wire.encode_layout(layout(engine="1")))
        assert (code, details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "1 streams are served already")
        worker.send(1.0)
        worker.close()
        wait_for(lambda: 'rank="pp0tp0"} 0.0' in sidecar.scrape(), 10)
        sidecar.connect(layout(engine="1")).send(1.0)
    finally:
        sidecar.stop()


def test_the_largest_layout_fits(sidecar: Sidecar) -> None:
    sites = tuple(
        wire.Site(layer=layer, name="hidden", width=2**20, sharded=False, module="m" * 64)
        for layer in range(wire.MAX_SITES)
    )
    worker = sidecar.connect(layout(sites=sites))
    worker.send(3.0)
    assert len(sidecar.get("sites", engine="0")) == wire.MAX_SITES


def test_many_engines_stream_side_by_side(sidecar: Sidecar) -> None:
    workers: list[Worker] = [
        sidecar.connect(layout(engine=str(engine), instance=f"i{engine}", tp_rank=rank, tp_size=2))
        for engine in range(4)
        for rank in range(2)
    ]
    for worker in workers:
        worker.send([1.0, 2.0, 3.0])
    [model] = sidecar.get("models")
    assert [(engine["engine"], len(engine["ranks"])) for engine in model["engines"]] == [(str(n), 2) for n in range(4)]
    assert len(sidecar.get("sites")) == 4 * len(SITES)
