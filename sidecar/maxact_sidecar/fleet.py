"""Hop 7/9: all engines of one sidecar, found by who a worker says it is, and the cards they are judged against."""

from __future__ import annotations

import logging

from maxact_proto import wire
from maxact_sidecar.card import Card, LoadedCard
from maxact_sidecar.config import Settings
from maxact_sidecar.headroom import Instant
from maxact_sidecar.merge import RankState
from maxact_sidecar.state import Engine, SiteKey, Snapshot

_log = logging.getLogger(__name__)


class Fleet:
    """Engines and cards. Changed on the event loop only; may be read from any thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._engines: dict[tuple[str, str], Engine] = {}
        self._cards: dict[str, LoadedCard] = {}

    def attach(self, layout: wire.Layout) -> tuple[Engine, RankState]:
        """The engine and rank of a worker that connected. Raises `WireError` where its sites changed.

        A second vLLM that serves the same model under the same engine name at the same time is an engine of its own,
        named ``engine@instance``; one that comes after the first has gone is its restart.
        """
        key = (layout.model, self._label(layout))
        engine = self._engines.get(key)
        if engine is None:
            engine = Engine(layout, key[1], self._settings, self._limits(layout.model))
            self._announce(engine)
        rank = engine.attach(layout)
        self._engines[key] = engine
        return engine, rank

    def _label(self, layout: wire.Layout) -> str:
        alias = f"{layout.engine}@{layout.instance}"
        named = self._engines.get((layout.model, layout.engine))
        taken = named is not None and named.connected and named.instance != layout.instance
        return alias if taken or (layout.model, alias) in self._engines else layout.engine

    def _announce(self, engine: Engine) -> None:
        if engine.is_alias:
            _log.warning(
                "two live engines model=%s engine=%s: the second is shown as %s; give each its own --maxact-engine",
                *(engine.model, engine.layout.engine, engine.label),
            )
        if self._cards and engine.model not in self._cards:
            _log.warning(
                "no card for model=%s: its range is not judged; cards are loaded for %s, choose one with "
                "--card MODEL=FILE",
                *(engine.model, sorted(self._cards)),
            )

    def snapshots(self, now: Instant) -> list[Snapshot]:
        """Engines that are connected or left less than the stale time ago, by model and engine."""
        engines = [engine for _, engine in sorted(self._engines.items())]
        return [engine.snapshot(now) for engine in engines if not self._is_stale(engine, now)]

    def _is_stale(self, engine: Engine, now: Instant) -> bool:
        left_at = engine.disconnected_at
        return left_at is not None and now.steady - left_at > self._settings.stale

    def settle(self, now: Instant) -> None:
        """Clear flags whose time has come, also of engines nobody looks at; forget aliases, which never come back."""
        for key, engine in list(self._engines.items()):
            engine.settle(now)
            if engine.is_alias and self._is_stale(engine, now):
                del self._engines[key]

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
