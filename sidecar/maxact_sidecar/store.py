"""What a sidecar remembers over its own end: high-water marks, flags and cards, in one SQLite file.

Only what changed is written, about once a second and not before a window is acknowledged: the first window of a stream
carries the lifetime extrema of its worker, so what was not yet written comes back from a worker that lives on. A mark
is lost only where a worker and the sidecar die within the same second.

Before start, a folder that cannot be used is an error. Later nothing stops the sidecar: what cannot be written (disk
full, file system read-only) stays in memory and is tried again; a damaged file is kept under another name, one that
vanished is made anew, and all that memory holds is written into the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from maxact_proto import stats
from maxact_sidecar.card import Card, LoadedCard
from maxact_sidecar.config import ConfigError
from maxact_sidecar.families import SelfMetrics
from maxact_sidecar.headroom import ALL_CRITERIA, FLAG, Criterion, FlagTable, Instant
from maxact_sidecar.snapshot import SiteKey

EngineKey = tuple[str, str]
"""(model, engine)."""

FILE: Final = "maxact.db"
_APPLICATION: Final = 0x6D786163  # "mxac", so that a file of somebody else's is recognised
_MIGRATIONS: Final = (
    """
    CREATE TABLE marks (
        model TEXT, engine TEXT, layer INTEGER, site TEXT, phase TEXT, absmax REAL NOT NULL,
        PRIMARY KEY (model, engine, layer, site, phase)
    ) WITHOUT ROWID;
    CREATE TABLE flags (
        model TEXT, engine TEXT, layer INTEGER, site TEXT, meaning TEXT,
        active INTEGER NOT NULL, since REAL NOT NULL, last_exceeded REAL NOT NULL,
        absmax REAL NOT NULL, "limit" REAL NOT NULL, threshold REAL NOT NULL, phase TEXT NOT NULL,
        PRIMARY KEY (model, engine, layer, site, meaning)
    ) WITHOUT ROWID;
    CREATE TABLE cards (
        model TEXT, name TEXT, document TEXT NOT NULL, PRIMARY KEY (model, name)
    ) WITHOUT ROWID;
    """,
    # What was not counted is not made up: the rate of a flag from before begins with the first window after.
    """
    ALTER TABLE flags RENAME TO flags_1;
    CREATE TABLE flags (
        model TEXT, engine TEXT, layer INTEGER, site TEXT, meaning TEXT, format TEXT,
        active INTEGER NOT NULL, since REAL NOT NULL, last_exceeded REAL NOT NULL,
        absmax REAL NOT NULL, "limit" REAL NOT NULL, threshold REAL NOT NULL, phase TEXT,
        first_exceeded REAL NOT NULL, windows INTEGER NOT NULL, windows_exceeded INTEGER NOT NULL,
        first_windows INTEGER NOT NULL, prefill_windows INTEGER NOT NULL, decode_windows INTEGER NOT NULL,
        PRIMARY KEY (model, engine, layer, site, meaning, format)
    ) WITHOUT ROWID;
    INSERT INTO flags
        SELECT model, engine, layer, site, meaning, CASE meaning WHEN 'resolution' THEN 'int8' ELSE '' END,
            active, since, last_exceeded, absmax, "limit", threshold, phase, since, 0, 0, 0, 0, 0
        FROM flags_1;
    DROP TABLE flags_1;
    """,
)
"""Number k leads from schema k to k + 1; schema 0 is an empty file."""
_NO_LAYER: Final = -1
_LAST_EXCEEDED_SECONDS: Final = 10.0
"""While a flag is exceeded in every window, its last time is written this often."""
_WINDOWS_GROWN, _WINDOWS_MORE = 1.1, 60
"""Of a flag that is not exceeded, the number of windows is written when it grew by a tenth and this."""
_UPSERT_FLAG: Final = f"REPLACE INTO flags VALUES ({', '.join('?' * 19)})"
_UPSERT_MARK: Final = (
    "INSERT INTO marks VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET absmax = max(absmax, excluded.absmax)"
)
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What outlives the workers of an engine. P phases, S sites, M criteria."""

    criteria: tuple[Criterion, ...]
    keys: tuple[SiteKey, ...]
    high_water: npt.NDArray[np.float32]
    """``[P, S]``: largest absmax ever, ``-inf`` where nothing was seen."""
    flags: FlagTable
    """``[M, S]``."""


def empty_memory(keys: tuple[SiteKey, ...], criteria: tuple[Criterion, ...]) -> Memory:
    """Of sites that saw nothing."""
    high_water = np.full((len(stats.PHASES), len(keys)), -np.inf, np.float32)
    flags = np.zeros((len(criteria), len(keys)), FLAG)
    return Memory(criteria=criteria, keys=keys, high_water=high_water, flags=flags)


def recall(memory: Memory, keys: tuple[SiteKey, ...], criteria: tuple[Criterion, ...]) -> Memory:
    """What is known of these sites, by these criteria."""
    recalled = empty_memory(keys, criteria)
    position = {key: index for index, key in enumerate(memory.keys)}
    pairs = [(index, position[key]) for index, key in enumerate(keys) if key in position]
    to, at = np.array(pairs, np.intp).reshape(-1, 2).T
    recalled.high_water[:, to] = memory.high_water[:, at]
    for row, criterion in enumerate(criteria):
        if criterion in memory.criteria:
            recalled.flags[row, to] = memory.flags[memory.criteria.index(criterion), at]
    return recalled


class Store:
    """The file. `save` may run on another thread than the other methods, one call at a time."""

    def __init__(self, folder: Path, metrics: SelfMetrics) -> None:
        """Open or make the file. Raises `ConfigError` where the folder cannot be used."""
        self._folder = folder
        self._path = folder / FILE
        self._errors = metrics.state_errors
        self._failing = False
        self._engines: dict[EngineKey, Memory] = {}
        """What is in the file, of the engines that were saved or loaded."""
        self._cards: list[LoadedCard] = []
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock(folder)
        except OSError as error:
            raise ConfigError(f"state: {folder}: {error.strerror}") from None
        try:
            self._connection = self._open()
        except (sqlite3.Error, ConfigError) as error:
            self._lock.close()
            raise ConfigError(
                str(error) if isinstance(error, ConfigError) else f"state: {self._path}: {error}"
            ) from None

    def close(self) -> None:
        """Close the file and let others have the folder."""
        self._connection.close()
        self._lock.close()

    def load_engines(self, now: Instant) -> dict[EngineKey, Memory]:
        """All engines in the file. Raised flags count as raised now, as far as their minimum time goes."""
        sites: dict[EngineKey, dict[SiteKey, int]] = {}
        marks = self._connection.execute("SELECT * FROM marks").fetchall()
        flags = self._connection.execute("SELECT * FROM flags").fetchall()
        for model, engine, layer, site, *_ in (*marks, *flags):
            own = sites.setdefault((model, engine), {})
            own.setdefault(_key(layer, site), len(own))
        self._engines = {engine: empty_memory(tuple(own), ALL_CRITERIA) for engine, own in sites.items()}
        for model, engine, layer, site, phase, absmax in marks:
            at = (stats.PHASES.index(phase), sites[model, engine][_key(layer, site)])
            self._engines[model, engine].high_water[at] = absmax
        for model, engine, layer, site, meaning, name, *row in flags:
            at = (ALL_CRITERIA.index(Criterion(meaning, name)), sites[model, engine][_key(layer, site)])
            self._engines[model, engine].flags[at] = _flag(row, now)
        return dict(self._engines)

    def load_cards(self) -> list[LoadedCard]:
        """Cards that were loaded into a running sidecar. One that cannot be read any more is left out."""
        self._cards = []
        for model, name, document in self._connection.execute("SELECT model, name, document FROM cards"):
            try:
                card = Card.model_validate_json(document)
            except ValidationError as error:
                _log.warning("card of the state not restored name=%s model=%s reason=%s", name, model, error)
                continue
            self._cards.append(LoadedCard(name=name, served_model=model, card=card))
        return list(self._cards)

    @property
    def is_behind(self) -> bool:
        """True where the file may lack what former calls of `save` were given: engines that did not change, too."""
        return self._failing or not self._path.exists()

    def save(
        self, engines: Iterable[tuple[EngineKey, Memory]], cards: Sequence[LoadedCard], *, all_windows: bool = False
    ) -> None:
        """Write what changed. Raises nothing: what was not written is tried again by the next call.

        ``engines``: asked for one after another, so that the memories of a fleet need not be there all at once;
        ``all_windows``: also numbers of windows that grew by little.
        """
        try:
            self._reopen_if_gone()
            self._write(engines, cards, all_windows)
        except (sqlite3.Error, OSError, ConfigError) as error:
            self._report(error)
        else:
            if self._failing:
                _log.info("state is written again file=%s", self._path)
            self._failing = False

    def _report(self, error: Exception) -> None:
        self._errors.inc()
        if not self._failing:
            _log.error("state not written file=%s reason=%s; kept in memory, tried again", self._path, error)
        self._failing = True
        if getattr(error, "sqlite_errorcode", None) in _DAMAGED:
            self._connection.close()
            self._set_aside()

    def _reopen_if_gone(self) -> None:
        """A file that was deleted or set aside: everything is written into a new one."""
        if not self._path.exists():
            self._connection.close()
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._engines, self._cards = {}, []
            self._connection = self._open()

    def _write(
        self, engines: Iterable[tuple[EngineKey, Memory]], cards: Sequence[LoadedCard], all_windows: bool
    ) -> None:
        written: dict[EngineKey, Memory] = {}
        with self._connection:  # one transaction, and only one engine's rows in memory
            for engine, memory in engines:
                before = self._engines.get(engine) or empty_memory((), memory.criteria)
                changed = _changed(memory, before, all_windows)
                self._connection.executemany(_UPSERT_MARK, _mark_rows(engine, memory, before))
                self._connection.executemany(_UPSERT_FLAG, _flag_rows(engine, memory, changed))
                written[engine] = _as_written(memory, before, changed)
            if list(cards) != self._cards:
                self._connection.execute("DELETE FROM cards")
                rows = [(each.served_model, each.name, each.card.model_dump_json()) for each in cards]
                self._connection.executemany("INSERT INTO cards VALUES (?, ?, ?)", rows)
        self._engines |= written
        self._cards = list(cards)

    def _open(self) -> sqlite3.Connection:
        """The file, checked and migrated; a damaged one is set aside first."""
        try:
            return _connect(self._path)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode not in _DAMAGED:
                raise
        self._set_aside()
        return _connect(self._path)

    def _set_aside(self) -> None:
        kept = self._path.with_name(f"{FILE}.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self._path}{suffix}", f"{kept}{suffix}")
        _log.error("state was damaged: kept as %s, going on without what only it held", kept)


def _lock(folder: Path) -> Any:
    """An open file that holds the folder for this process; the system frees it however the process ends."""
    file = (folder / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"state: {folder} is in use by another sidecar") from None
    return file


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False)
    try:
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Check the file and bring it to the schema of today. Raises `ConfigError` where it is not ours, or newer."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")  # no wait for the disk; a power cut may cost the last seconds
    [[verdict]] = connection.execute("PRAGMA quick_check(1)").fetchall()
    if verdict != "ok":
        damaged = sqlite3.DatabaseError(verdict)
        damaged.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise damaged
    [[application]] = connection.execute("PRAGMA application_id").fetchall()
    [[schema]] = connection.execute("PRAGMA user_version").fetchall()
    [[num_tables]] = connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    if application != _APPLICATION and num_tables:
        raise ConfigError(f"state: {path} is not a state of maxact: choose another folder")
    if schema > len(_MIGRATIONS):
        raise ConfigError(
            f"state: {path} has schema {schema}, written by a newer maxact; this one reads up to {len(_MIGRATIONS)}: "
            "run the newer one, or choose another folder"
        )
    for number, script in enumerate(_MIGRATIONS[schema:], start=schema + 1):
        pragmas = f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {number};"
        connection.executescript(f"BEGIN; {script} {pragmas} COMMIT;")
    connection.executescript("BEGIN IMMEDIATE; ROLLBACK;")  # fails here and now where the file is read-only


def _key(layer: int, site: str) -> SiteKey:
    return (None if layer == _NO_LAYER else layer, site)


def _flag(row: Sequence[Any], now: Instant) -> Any:
    active, since, last_exceeded, absmax, limit, threshold, phase, first_exceeded, windows, exceeded, *phases = row
    flag = np.zeros((), FLAG)
    flag["active"], flag["since"], flag["raised"], flag["last_exceeded"] = active, since, now.steady, last_exceeded
    flag["absmax"], flag["limit"], flag["threshold"] = absmax, limit, threshold
    flag["phase"] = -1 if phase is None else stats.PHASES.index(phase)
    flag["first_exceeded"], flag["windows"], flag["windows_exceeded"] = first_exceeded, windows, exceeded
    flag["phases_exceeded"] = phases
    return flag


def _mark_rows(engine: EngineKey, memory: Memory, before: Memory) -> Iterable[tuple[Any, ...]]:
    """Marks that rose. Sites only come to an engine's table, and keep their positions."""
    rose = np.isfinite(memory.high_water)
    known = _shared(memory, before)
    rose[:, :known] &= memory.high_water[:, :known] != before.high_water[:, :known]
    for phase, site in np.argwhere(rose).tolist():
        layer, name = memory.keys[site]
        place = (_NO_LAYER if layer is None else layer, name, stats.PHASES[phase])
        yield (*engine, *place, float(memory.high_water[phase, site]))


def _flag_rows(engine: EngineKey, memory: Memory, changed: npt.NDArray[np.bool_]) -> Iterable[tuple[Any, ...]]:
    for row, site in np.argwhere(changed).tolist():
        layer, name = memory.keys[site]
        criterion, flag = memory.criteria[row], memory.flags[row, site]
        place = (_NO_LAYER if layer is None else layer, name, criterion.meaning, criterion.format)
        worst = [float(flag[column]) for column in ("since", "last_exceeded", "absmax", "limit", "threshold")]
        phase = None if flag["phase"] < 0 else stats.PHASES[flag["phase"]]
        windows = (int(flag["windows"]), int(flag["windows_exceeded"]), *flag["phases_exceeded"].tolist())
        yield (*engine, *place, int(flag["active"]), *worst, phase, float(flag["first_exceeded"]), *windows)


def _changed(memory: Memory, before: Memory, all_windows: bool) -> npt.NDArray[np.bool_]:
    """``[M, S]``: flags whose row is to be written."""
    new = memory.flags
    changed: npt.NDArray[np.bool_] = new["first_exceeded"] > 0
    known = _shared(memory, before)
    if not known or not changed.any():
        return changed
    head, old = new[:, :known], before.flags[:, :known]
    moved = head["last_exceeded"] - old["last_exceeded"] >= _LAST_EXCEEDED_SECONDS
    for column in ("active", "since", "absmax", "limit"):
        moved |= head[column] != old[column]
    enough = old["windows"] + 1 if all_windows else old["windows"] * _WINDOWS_GROWN + _WINDOWS_MORE
    moved |= head["windows"] >= enough
    changed[:, :known] &= moved
    return changed


def _shared(memory: Memory, before: Memory) -> int:
    """How many leading sites both hold at the same positions, judged by the same criteria."""
    known = len(before.keys)
    return known if memory.keys[:known] == before.keys and memory.criteria == before.criteria else 0


def _as_written(memory: Memory, before: Memory, changed: npt.NDArray[np.bool_]) -> Memory:
    """``memory`` with the flags that are in the file, where they were not worth writing; its own are written over."""
    if not (known := _shared(memory, before)) or not memory.flags.flags.writeable:
        return memory
    kept = ~changed[:, :known]
    memory.flags[:, :known][kept] = before.flags[:, :known][kept]
    return memory
