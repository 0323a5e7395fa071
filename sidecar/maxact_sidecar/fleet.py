"""Hop 7/9: all engines of one sidecar, found by who a worker says it is, and the cards they are judged against."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from maxact_proto import wire
from maxact_sidecar.card import LoadedCard
from maxact_sidecar.config import Settings
from maxact_sidecar.headroom import Instant
from maxact_sidecar.history import History
from maxact_sidecar.merge import RankState
from maxact_sidecar.snapshot import SiteKey, Snapshot
from maxact_sidecar.state import Engine
from maxact_sidecar.store import EngineKey, Memory

_MOST_GONE: Final = 1024

_log = logging.getLogger(__name__)


class Fleet:
    """Engines and cards. Changed on the event loop only; may be read from any thread."""

    def __init__(
        self,
        settings: Settings,
        memories: Mapping[EngineKey, Memory] | None = None,
        cards: Iterable[LoadedCard] = (),
    ) -> None:
        """No engine yet; ``memories`` and ``cards``: what was there before this process."""
        self._settings = settings
        self._memories = dict(memories or {})
        self._engines: dict[EngineKey, Engine] = {}
        self._cards = list(cards)
        self.history = History(settings.hold)
        """absmax over time, of the engines that `snapshots` shows."""

    def use_settings(self, settings: Settings, now: Instant) -> None:
        """Take over what may change while running: thresholds and times of flags, and when an engine is stale."""
        self._settings = settings
        for engine in self._engines.values():
            engine.set_thresholds(settings, now)

    def attach(self, layout: wire.Layout) -> tuple[Engine, RankState]:
        """The engine and rank of a worker that connected. Raises `WireError` where its sites changed.

        A second vLLM that serves the same model under the same engine name at the same time is an engine of its own,
        named ``engine@instance``; one that comes after the first has gone is its restart. Another model under another
        name is another engine, and the former one goes stale; under the same name it is a restart, with a warning.
        """
        # Most workers hold the same sites: one table instead of 512 saves a fleet 75 MB.
        tables = (table for engine in self._engines.values() for table in engine.site_tables)
        layout = replace(layout, sites=next((table for table in tables if table == layout.sites), layout.sites))
        key = (layout.model, self._label(layout))
        engine = self._engines.get(key)
        if engine is None:
            self._forget_surplus()
            engine = Engine(layout, key[1], self._settings, self._limits(layout.model), self._memories.pop(key, None))
            self._announce(engine)
        elif engine.instance != layout.instance:
            _warn_of_another_model(engine.layout, layout)
            engine = engine.restarted(layout, self._settings)
        rank = engine.attach(layout)
        self._engines[key] = engine
        return engine, rank

    def _forget_surplus(self) -> None:
        """Names cost nothing to invent: of engines that are gone only so many are kept."""
        gone = [(engine.disconnected_at, key) for key, engine in self._engines.items() if not engine.connected]
        if len(gone) >= _MOST_GONE:
            _, key = min(gone)
            del self._engines[key]
            _log.warning(
                "forgotten, too many engines are gone model=%(model)s engine=%(engine)s",
                {"model": key[0], "engine": key[1]},
            )

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
        models = sorted({card.served_model for card in self._cards})
        if models and engine.model not in models:
            _log.warning(
                "no card for model=%s: its range is not judged; cards are loaded for %s, choose one with "
                "--card MODEL=FILE",
                *(engine.model, models),
            )

    @property
    def engines(self) -> dict[EngineKey, Engine]:
        """Engines that return under their name, gone ones included."""
        return {key: engine for key, engine in self._engines.items() if not engine.is_alias}

    def snapshots(self, now: Instant, *, ranks_apart: bool = False) -> list[Snapshot]:
        """Engines that are connected or left less than the stale time ago, by model and engine."""
        return [engine.snapshot(now, ranks_apart=ranks_apart) for engine in self._shown(now).values()]

    def _shown(self, now: Instant) -> dict[EngineKey, Engine]:
        return {key: engine for key, engine in sorted(self._engines.items()) if not self._is_stale(engine, now)}

    def _is_stale(self, engine: Engine, now: Instant) -> bool:
        left_at = engine.disconnected_at
        return left_at is not None and now.steady - left_at > self._settings.stale

    def settle(self, now: Instant) -> None:
        """Clear flags whose time has come, also of engines nobody looks at; forget aliases, which never come back.

        To be called about once a second; writes history as well.
        """
        for key, engine in list(self._engines.items()):
            engine.settle(now)
            if engine.is_alias and self._is_stale(engine, now):
                del self._engines[key]
        if self.history.is_due(now):
            self.history.add({key: engine.current(now) for key, engine in self._shown(now).items()}, now)

    @property
    def cards(self) -> list[LoadedCard]:
        """Cards in use, by served model and name."""
        return list(self._cards)

    def configure_cards(self, cards: Iterable[LoadedCard], now: Instant) -> None:
        """Use the cards of a configuration in place of those of the former one.

        A card that was loaded into the running sidecar stays unless the configuration has one for its model.
        """
        configured = [replace(card, configured=True) for card in cards]
        models = {card.served_model for card in configured}
        loaded = [card for card in self._cards if not card.configured]
        for card in loaded:
            if card.served_model in models:
                _log.warning("card name=%s model=%s gives way to the configured one", card.name, card.served_model)
        self._set_cards([*configured, *(card for card in loaded if card.served_model not in models)], now)
        for card in configured:
            self._announce_card(card)

    def load_card(self, loaded: LoadedCard, now: Instant, *, add: bool = False) -> None:
        """Judge ``range`` of a served model against a card, in place of the former ones or, with ``add``, as well."""
        others = [
            card
            for card in self._cards
            if card.served_model != loaded.served_model or (add and card.name != loaded.name)
        ]
        self._set_cards([*others, loaded], now)
        self._announce_card(loaded)

    def _set_cards(self, cards: Iterable[LoadedCard], now: Instant) -> None:
        former = {engine.model: self._limits(engine.model) for engine in self._engines.values()}
        self._cards = sorted(cards, key=lambda card: (card.served_model, card.name))
        for engine in self._engines.values():
            limits = self._limits(engine.model)
            if limits != former[engine.model]:
                engine.set_range_limits(limits, now)

    def _announce_card(self, loaded: LoadedCard) -> None:
        model, card = loaded.served_model, loaded.card
        _log.info(
            "card loaded name=%(card)s model=%(model)s sites=%(sites)d tokens=%(tokens)d",
            {"card": loaded.name, "model": model, "sites": len(card.limits()), "tokens": card.num_tokens},
        )
        served = {engine.model for engine in self._engines.values()}
        others = sorted(served - {each.served_model for each in self._cards})
        if model not in served and others:
            _log.warning(
                "card name=%s is for model=%s, which nobody serves here; served: %s", loaded.name, model, others
            )

    def _limits(self, model: str) -> dict[SiteKey, float]:
        """The widest calibrated absmax per site: traffic left what was calibrated where no card covers it."""
        limits: dict[SiteKey, float] = {}
        for loaded in self._cards:
            if loaded.served_model == model:
                for key, limit in loaded.card.limits().items():
                    limits[key] = max(limit, limits.get(key, 0.0))
        return limits


def _warn_of_another_model(before: wire.Layout, now: wire.Layout) -> None:
    """Where a name serves something else than before: its marks and its card are not of what runs now."""
    widths = {(site.layer, site.name): site.width for site in before.sites if not site.sharded}
    differ = [
        site for site in now.sites if not site.sharded and site.width != widths.get((site.layer, site.name), site.width)
    ]
    if differ or before.model_type != now.model_type:
        _log.warning(
            "another model under the same name model=%(model)s engine=%(engine)s was=%(was)s is=%(is)s: its high-water "
            "marks go on; serve it under a name of its own",
            {"model": now.model, "engine": now.engine, "was": before.model_type, "is": now.model_type},
        )
