"""Hop 7/9: all engines of one sidecar, found by who a worker says it is, and the cards they are judged against."""

from __future__ import annotations

import logging
from collections import defaultdict

from maxact_proto import wire
from maxact_sidecar.card import Card, LoadedCard
from maxact_sidecar.config import Settings
from maxact_sidecar.headroom import Instant
from maxact_sidecar.merge import RankState
from maxact_sidecar.state import Engine, SiteKey, Snapshot

_log = logging.getLogger(__name__)


class Fleet:
    """Engines and cards. Everything here runs on the event loop; only `Engine` may be called from elsewhere."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._engines: dict[tuple[str, str], Engine] = {}
        self._cards: dict[str, LoadedCard] = {}

    def attach(self, layout: wire.Layout) -> tuple[Engine, RankState]:
        """The engine and rank of a worker that connected. Raises `WireError` where its sites changed.

        A second vLLM that serves the same model under the same engine name at the same time is an engine of its own,
        named ``engine@instance``; one that comes after the first has gone is its restart.
        """
        label = layout.engine
        known = self._engines.get((layout.model, label))
        if known is not None and known.connected and known.instance != layout.instance:
            label = f"{layout.engine}@{layout.instance}"
            _log.warning(
                "two live engines model=%s engine=%s: the second is shown as %s; give each its own --maxact-engine",
                *(layout.model, layout.engine, label),
            )
        key = (layout.model, label)
        if key not in self._engines:
            self._engines[key] = Engine(layout, label, self._settings, self._limits(layout.model))
        return self._engines[key], self._engines[key].attach(layout)

    def snapshots(self, now: Instant) -> list[Snapshot]:
        """Engines that are connected or left less than the stale time ago, by model and engine."""
        return [engine.snapshot(now) for _, engine in sorted(self._engines.items()) if not self._is_stale(engine, now)]

    def _is_stale(self, engine: Engine, now: Instant) -> bool:
        return engine.disconnected_at is not None and now.steady - engine.disconnected_at > self._settings.stale

    def settle(self, now: Instant) -> None:
        """Clear flags whose time has come, also of engines nobody looks at."""
        for engine in self._engines.values():
            engine.settle(now)

    @property
    def cards(self) -> list[LoadedCard]:
        """Cards in use, by served model."""
        return [self._cards[model] for model in sorted(self._cards)]

    def use_card(self, card: Card, now: Instant, *, name: str, served_model: str | None = None) -> LoadedCard:
        """Judge ``range`` of a served model (default: the card's own) against a card; it replaces the former one."""
        model = served_model or card.model
        loaded = LoadedCard(name=name, served_model=model, card=card)
        self._cards[model] = loaded
        served = [engine for engine in self._engines.values() if engine.model == model]
        for engine in served:
            engine.set_range_limits(self._limits(model), now)
        _log.info("card loaded name=%s model=%s sites=%d tokens=%d", name, model, len(card.limits()), card.num_tokens)
        others = sorted({engine.model for engine in self._engines.values()} - set(self._cards))
        if not served and others:
            _log.warning("card name=%s is for model=%s, which nobody serves here; served: %s", name, model, others)
        return loaded

    def _limits(self, model: str) -> dict[SiteKey, float]:
        loaded = self._cards.get(model)
        return loaded.card.limits() if loaded else {}

    def by_model(self, now: Instant) -> dict[str, list[Snapshot]]:
        """Snapshots grouped by model."""
        groups: dict[str, list[Snapshot]] = defaultdict(list)
        for snapshot in self.snapshots(now):
            groups[snapshot.model].append(snapshot)
        return groups
