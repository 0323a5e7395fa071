"""The wire: what goes in comes out, and what breaks a limit is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from workers import SITES, layout, window

from maxact_proto import stats, wire
from maxact_proto.v1 import telemetry_pb2 as pb


def through_bytes(request: Any) -> Any:
    return pb.StreamRequest.FromString(request.SerializeToString())


def test_a_layout_comes_out_as_it_went_in() -> None:
    own = layout(tp_rank=1, tp_size=2, pp_rank=1, pp_size=3, interval_seconds=0.5, maxact_version="0.1.0")
    assert wire.decode_layout(through_bytes(wire.encode_layout(own)).layout) == own
    assert own.rank == "pp1tp1"


def test_layer_zero_is_not_no_layer() -> None:
    decoded = wire.decode_layout(through_bytes(wire.encode_layout(layout())).layout)
    assert [site.layer for site in decoded.sites] == [None, 0, 0]


def test_a_window_comes_out_bit_equal() -> None:
    own = window(7, [1.0, np.float32(3.3), 2e4], layout_id=3, coalesced=2)
    decoded = wire.decode_window(through_bytes(wire.encode_window(own)).window, len(SITES))
    for field in dataclasses.fields(wire.Window):
        expected, seen = getattr(own, field.name), getattr(decoded, field.name)
        np.testing.assert_array_equal(seen, expected, err_msg=field.name)


@pytest.mark.parametrize(
    ("tokens", "phases"),
    [((0, 0, 0), []), ((0, 0, 5), [2]), ((1, 0, 0), [0]), ((1, 4, 0), [0, 1]), ((1, 0, 5), [0, 1, 2])],
)
def test_only_phases_with_tokens_are_sent(tokens: tuple[int, ...], phases: list[int]) -> None:
    own = window(1, 2.0, tokens=tokens, values=np.full((3, len(SITES), 5), 7.0, np.float32), lifetime=None)
    for phase, count in enumerate(tokens):
        if not count:
            own.values[phase] = stats.empty(len(SITES))[phase]
    message = wire.encode_window(own).window
    assert len(message.values) == len(phases) * len(SITES) * 5 * 4
    assert message.lifetime == b""
    decoded = wire.decode_window(message, len(SITES))
    np.testing.assert_array_equal(decoded.values, own.values)
    assert decoded.lifetime is None


def broken_layout(**changes: Any) -> pb.Layout:
    message = wire.encode_layout(layout()).layout
    for name, value in changes.items():
        setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": ""}, "layout.model"),
        ({"model": "x" * 600}, "layout.model"),
        ({"engine": ""}, "layout.engine"),
        ({"instance": ""}, "layout.instance"),
        ({"interval_seconds": float("nan")}, "layout.interval_seconds"),
        ({"interval_seconds": 0.0}, "layout.interval_seconds"),
    ],
)
def test_a_layout_that_breaks_a_limit_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(wire.WireError) as raised:
        wire.decode_layout(broken_layout(**changes))
    assert raised.value.field == field


def test_a_layout_without_sites_or_with_too_many_is_refused() -> None:
    message = broken_layout()
    del message.sites[:]
    with pytest.raises(wire.WireError, match="0 sites"):
        wire.decode_layout(message)
    message.sites.extend([pb.Site(name="hidden", width=1)] * (wire.MAX_SITES + 1))
    with pytest.raises(wire.WireError, match="20001 sites"):
        wire.decode_layout(message)


def test_an_unknown_site_is_refused_with_its_position() -> None:
    message = broken_layout()
    message.sites[2].name = "logits"
    with pytest.raises(wire.WireError, match=r"layout\.sites\[2\]\.name: 'logits'"):
        wire.decode_layout(message)


def test_a_site_that_is_listed_twice_is_refused() -> None:
    message = broken_layout()
    message.sites.append(message.sites[1])
    with pytest.raises(wire.WireError, match=r"layout\.sites\[3\]: hidden of layer 0 is listed twice"):
        wire.decode_layout(message)


def test_another_table_of_statistics_is_refused_and_says_what_to_do() -> None:
    message = broken_layout()
    del message.stats[0]
    with pytest.raises(wire.WireError, match="run the same maxact version on both sides"):
        wire.decode_layout(message)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"values": b"\0" * 8}, "window.values"),
        ({"lifetime": b"\0" * 8}, "window.lifetime"),
        ({"sequence": 0}, "window.sequence"),
        ({"end_seconds": float("inf")}, "window.start_seconds"),
    ],
)
def test_a_window_that_breaks_a_limit_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    message = wire.encode_window(window(1, 1.0)).window
    for name, value in changes.items():
        setattr(message, name, value)
    with pytest.raises(wire.WireError) as raised:
        wire.decode_window(message, len(SITES))
    assert raised.value.field == field


def test_a_nan_never_enters_the_statistics() -> None:
    own = window(1, 1.0)
    own.values[stats.PREFILL, 0, stats.SUM_ABS] = np.nan
    with pytest.raises(wire.WireError, match=r"window\.values: holds a NaN"):
        wire.decode_window(wire.encode_window(own).window, len(SITES))


@pytest.mark.parametrize(
    ("column", "value"),
    [(stats.MAX, np.inf), (stats.MIN, -np.inf), (stats.SUM_ABS, -1.0), (stats.NONFINITE, -1.0)],
)
def test_a_value_no_activation_can_have_is_refused(column: int, value: float) -> None:
    own = window(1, 1.0)
    own.values[stats.PREFILL, 0, column] = value
    with pytest.raises(wire.WireError, match=r"window\.values: holds an infinite extremum or a negative sum"):
        wire.decode_window(wire.encode_window(own).window, len(SITES))


def test_a_sum_of_squares_may_overflow() -> None:
    own = window(1, 1.0)
    own.values[stats.PREFILL, 0, stats.SUM_SQUARES] = np.inf
    decoded = wire.decode_window(wire.encode_window(own).window, len(SITES))
    assert decoded.values[stats.PREFILL, 0, stats.SUM_SQUARES] == np.inf


@pytest.mark.parametrize("changes", [{"tokens": (0, 2**60, 0)}, {"coalesced": 2**60}])
def test_a_count_no_counter_can_hold_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(wire.WireError, match=r"window\.tokens: a count is above"):
        wire.decode_window(wire.encode_window(window(1, 1.0, **changes)).window, len(SITES))
