"""Fleets without a network, under a clock of the test's own."""

from __future__ import annotations

from typing import Any

from workers import layout, window

from maxact_sidecar.card import Card, LoadedCard, build_card
from maxact_sidecar.config import make_settings
from maxact_sidecar.fleet import Fleet
from maxact_sidecar.headroom import Instant
from maxact_sidecar.snapshot import Snapshot


def at(seconds: float) -> Instant:
    return Instant(1e9 + seconds, 1000.0 + seconds)


def make(**settings: Any) -> Fleet:
    return Fleet(make_settings(**({"hold": 10.0, "flag_hold": 5.0, "stale": 60.0} | settings)))


class Rank:
    """A connected worker of a fleet, without a network."""

    def __init__(self, fleet: Fleet, **changes: Any) -> None:
        self.layout = layout(**changes)
        self.engine, self.state = fleet.attach(self.layout)
        self._sequence = self.state.last_sequence

    def send(self, seconds: float, peaks: Any, **changes: Any) -> bool:
        self._sequence += 1
        own = window(self._sequence, peaks, sites=len(self.layout.sites), **changes)
        return self.engine.merge_window(self.state, own, at(seconds))

    def leave(self, seconds: float) -> None:
        self.engine.detach(self.state, at(seconds))


def only(fleet: Fleet, seconds: float) -> Snapshot:
    [snapshot] = fleet.snapshots(at(seconds))
    return snapshot


def card_of(fleet: Fleet, seconds: float) -> Card:
    return build_card(fleet.snapshots(at(seconds)), now=1.0, maxact_version="test")


def use_card(fleet: Fleet, card: Card, now: Instant, *, name: str, add: bool = False, **given: str) -> None:
    loaded = LoadedCard(name=name, served_model=given.get("served_model", card.model), card=card)
    fleet.load_card(loaded, now, add=add)
