"""What a sidecar remembers: over a clean end, over kill -9, and where the disk does not play along."""

from __future__ import annotations

import resource
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from processes import Sidecar, program, wait_for
from watchers import free_port
from workers import MODEL, layout

from maxact_proto import stats
from maxact_sidecar.config import ConfigError
from maxact_sidecar.families import SelfMetrics
from maxact_sidecar.headroom import FLAG, Criterion, Instant, criteria, list_flags
from maxact_sidecar.store import FILE, Memory, Store, recall

NOW = Instant(1e9, 1000.0)
KEYS = ((None, "embedding"), (0, "hidden"))
ENGINE = (MODEL, "0")
CRITERIA = criteria(["int8"])
FP16 = CRITERIA.index(Criterion("fp16"))


def memory(peak: float, last_exceeded: float = 1e9, windows: int = 1000) -> Memory:
    high_water = np.full((len(stats.PHASES), len(KEYS)), -np.inf, np.float32)
    high_water[stats.PREFILL] = [np.float32(0.1), peak]
    flags = np.zeros((len(CRITERIA), len(KEYS)), FLAG)
    worst = (last_exceeded, peak, 65504.0, 1.25, stats.PREFILL)
    flags[FP16, 1] = (True, 1e9, 5.0, *worst, 9e8, windows, 7, (1, 5, 2))
    return Memory(criteria=CRITERIA, keys=KEYS, high_water=high_water, flags=flags)


@contextmanager
def opened(folder: Path) -> Iterator[Store]:
    store = Store(folder, SelfMetrics())
    try:
        yield store
    finally:
        store.close()


def reloaded(folder: Path) -> dict[tuple[str, str], Memory]:
    with opened(folder) as store:
        return store.load_engines(NOW)


def test_marks_and_flags_come_back_bit_for_bit(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.save({ENGINE: memory(6e4)}.items(), [])
    back = reloaded(tmp_path)[ENGINE]
    order = [back.keys.index(key) for key in KEYS]
    assert back.high_water[:, order].tobytes() == memory(6e4).high_water.tobytes()
    flag = back.flags[back.criteria.index(Criterion("fp16")), order[1]]
    assert flag["raised"] == NOW.steady
    flag["raised"] = 5.0
    assert flag == memory(6e4).flags[FP16, 1]


def test_a_mark_never_falls_on_disk_either(tmp_path: Path) -> None:
    for peak in (9.0, 3.0):
        with opened(tmp_path) as store:
            store.save({ENGINE: memory(peak)}.items(), [])
    back = reloaded(tmp_path)[ENGINE]
    assert back.high_water[stats.PREFILL, back.keys.index((0, "hidden"))] == 9.0


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.save({ENGINE: memory(6e4)}.items(), [])
        before = store._connection.total_changes
        store.save({ENGINE: memory(6e4, last_exceeded=1e9 + 5)}.items(), [])
        assert store._connection.total_changes == before
        store.save({ENGINE: memory(6e4, last_exceeded=1e9 + 11)}.items(), [])
        assert store._connection.total_changes == before + 1
        store.save({ENGINE: memory(7e4, last_exceeded=1e9 + 11)}.items(), [])
        assert store._connection.total_changes == before + 3


def test_windows_of_a_flag_that_is_not_exceeded_are_written_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.save({ENGINE: memory(6e4)}.items(), [])
        before = store._connection.total_changes
        store.save({ENGINE: memory(6e4, windows=1159)}.items(), [])
        assert store._connection.total_changes == before
        store.save({ENGINE: memory(6e4, windows=1160)}.items(), [])
        store.save({ENGINE: memory(6e4, windows=1161)}.items(), [])
        assert store._connection.total_changes == before + 1
        store.save({ENGINE: memory(6e4, windows=1161)}.items(), [], all_windows=True)
    back = reloaded(tmp_path)[ENGINE]
    assert back.flags["windows"].max() == 1161


SCHEMA_1 = """
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
    INSERT INTO marks VALUES ('tiny/llama', '0', 0, 'down_proj_input', 'prefill', 700.0);
    INSERT INTO flags VALUES
        ('tiny/llama', '0', 0, 'down_proj_input', 'resolution', 1, 8e8, 9e8, 700.0, 50.0, 1.0, 'prefill'),
        ('tiny/llama', '0', -1, 'embedding', 'range', 0, 7e8, 7.5e8, 9.0, 3.0, 0.9, 'first');
    PRAGMA application_id = 1836605795;
    PRAGMA user_version = 1;
"""
"""What a sidecar of the former schema left, in its own words."""


def test_a_state_of_the_former_schema_is_migrated(tmp_path: Path) -> None:
    spoil(tmp_path, SCHEMA_1)
    back = reloaded(tmp_path)[ENGINE]
    assert back.high_water[stats.PREFILL, back.keys.index((0, "down_proj_input"))] == 700.0
    flags = {(each.criterion, back.keys[each.site]): each for each in list_flags(back.flags, back.criteria)}
    resolution = flags[Criterion("resolution", "int8"), (0, "down_proj_input")]
    assert (resolution.active, resolution.since, resolution.last_exceeded) == (True, 8e8, 9e8)
    assert (resolution.absmax, resolution.limit, resolution.threshold, resolution.phase) == (
        700.0,
        50.0,
        1.0,
        "prefill",
    )
    assert resolution.first_exceeded == 8e8, "the earliest raise that is known"
    assert (resolution.windows, resolution.exceeded_ratio) == (0, None), "what was not counted is not made up"
    cleared = flags[Criterion("range"), (None, "embedding")]
    assert (cleared.active, cleared.first_exceeded, cleared.phase) == (False, 7e8, "first")
    assert len(flags) == 2
    [[schema]] = query(tmp_path, "PRAGMA user_version")
    assert schema == 2


def test_a_migrated_flag_goes_on_in_a_running_sidecar(tmp_path: Path) -> None:
    spoil(tmp_path, SCHEMA_1)
    sidecar = Sidecar(tmp_path / "log", "--state", str(tmp_path))
    try:
        sidecar.connect().send([1.0, 1.0, 60.0])
        [flag] = [each for each in sidecar.get("flags") if each["active"]]
        assert (flag["meaning"], flag["format"], flag["since"], flag["first_exceeded"]) == (
            "resolution",
            "int8",
            8e8,
            8e8,
        )
        assert (flag["windows"], flag["windows_exceeded"]) == (1, 1), "judged by the limit it was raised at"
    finally:
        sidecar.stop()


def test_an_engine_that_was_there_before_is_judged_by_other_formats_from_now_on(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.save({ENGINE: memory(6e4)}.items(), [])
    with opened(tmp_path) as store:
        [before] = store.load_engines(NOW).values()
        judged = criteria(["nvfp4", "int4"])
        now = recall(before, KEYS, judged)
        flag = now.flags[judged.index(Criterion("resolution", "nvfp4")), 0:1]
        flag["first_exceeded"], flag["absmax"] = 7.0, 2.0
        store.save({ENGINE: now}.items(), [])
    back = reloaded(tmp_path)[ENGINE]
    exceeded = {(each.criterion, back.keys[each.site]): each for each in list_flags(back.flags, back.criteria)}
    assert set(exceeded) == {
        (Criterion("fp16"), (0, "hidden")),
        (Criterion("resolution", "nvfp4"), (None, "embedding")),
    }
    assert exceeded[Criterion("fp16"), (0, "hidden")].windows == 1000


def test_a_folder_serves_one_sidecar(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(ConfigError, match="is in use by another sidecar"):
        Store(tmp_path, SelfMetrics())
    with opened(tmp_path):
        pass


def spoil(folder: Path, sql: str) -> None:
    with closing(sqlite3.connect(folder / FILE)) as connection:
        connection.executescript(sql)


def query(folder: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(folder / FILE)) as connection:
        return connection.execute(sql).fetchall()


def test_a_state_of_a_newer_maxact_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    spoil(tmp_path, "PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="has schema 99, written by a newer maxact"):
        Store(tmp_path, SelfMetrics())


def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    spoil(tmp_path, "CREATE TABLE bookmarks (url TEXT)")
    with pytest.raises(ConfigError, match="is not a state of maxact"):
        Store(tmp_path, SelfMetrics())
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        assert connection.execute("SELECT name FROM sqlite_schema").fetchall() == [("bookmarks",)]


@pytest.mark.parametrize("where", ["head", "middle"])
def test_a_damaged_file_is_kept_and_a_new_one_begun(tmp_path: Path, where: str) -> None:
    with opened(tmp_path) as store:
        store.save({(MODEL, str(engine)): memory(5.0) for engine in range(200)}.items(), [])
    size = (tmp_path / FILE).stat().st_size
    with (tmp_path / FILE).open("r+b") as file:
        file.seek(0 if where == "head" else size // 2)
        file.write(b"\x5a" * 4096)
    assert reloaded(tmp_path) == {}
    [kept] = tmp_path.glob(f"{FILE}.damaged-*")
    assert kept.stat().st_size == size


@pytest.mark.parametrize("how", ["deleted", "damaged"])
def test_a_file_lost_under_a_running_sidecar_is_written_anew(tmp_path: Path, how: str) -> None:
    with opened(tmp_path) as store:
        store.save({ENGINE: memory(5.0)}.items(), [])
        if how == "deleted":
            (tmp_path / FILE).unlink()
        else:
            spoil(tmp_path, "PRAGMA wal_checkpoint(TRUNCATE)")
            with (tmp_path / FILE).open("r+b") as file:
                file.write(b"\x5a" * 100_000)
        for peak in (6.0, 7.0, 8.0):
            store.save({ENGINE: memory(peak)}.items(), [])
    back = reloaded(tmp_path)[ENGINE]
    assert back.high_water[stats.PREFILL, back.keys.index((None, "embedding"))] == np.float32(0.1)
    assert len(list(tmp_path.glob(f"{FILE}.damaged-*"))) == (how == "damaged")


@pytest.fixture
def remembering(tmp_path: Path) -> Iterator[Sidecar]:
    running = Sidecar(tmp_path / "log", "--state", str(tmp_path / "state"), "--hold", "1", "--flag-hold", "600")
    yield running
    running.stop()


def marks(sidecar: Sidecar) -> dict[str, float | None]:
    return {each["site"]: each["absmax_high_water"] for each in sidecar.get("sites")}


def written(sidecar: Sidecar, query: str) -> Callable[[], bool]:
    def is_there() -> bool:
        with closing(sqlite3.connect(sidecar.log.parent / "state" / FILE)) as connection:
            return bool(connection.execute(query).fetchone())

    return is_there


def test_marks_flags_and_loaded_cards_survive_a_kill(remembering: Sidecar) -> None:
    worker = remembering.connect()
    worker.send([1.0, 10.0, 2.0])
    remembering.use_live_state_as_card()
    worker.send([1.0, 6e4, 2.0])
    [before] = [flag for flag in remembering.get("flags") if flag["meaning"] == "range"]
    wait_for(written(remembering, "SELECT 1 FROM flags, cards WHERE meaning = 'range'"), 10)
    remembering.kill()
    remembering.start()
    # vLLM has restarted too: nothing that is shown comes from the worker.
    remembering.connect(layout(instance="second")).send([1.0, 3.0, 2.0])
    assert marks(remembering) == {"embedding": 1.0, "hidden": 6e4, "down_proj_input": 2.0}
    [after] = [flag for flag in remembering.get("flags") if flag["meaning"] == "range"]
    assert (before["windows"], before["exceeded_ratio"]) == (1, 1.0)
    assert after == before | {"windows": 2, "exceeded_ratio": 0.5}, "the window after the restart did not exceed"
    assert [card["model"] for card in remembering.get("cards")] == [MODEL]


def test_a_clean_end_loses_nothing(remembering: Sidecar) -> None:
    worker = remembering.connect()
    worker.send([1.0, 123.5, 2.0])
    assert remembering.stop() == 0
    remembering.start()
    remembering.connect(layout(instance="second")).send(1.0)
    assert marks(remembering)["hidden"] == 123.5


def metric(sidecar: Sidecar, name: str) -> float:
    [line] = [line for line in sidecar.scrape().splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


def test_a_full_disk_is_told_once_and_made_up_for_when_there_is_room(remembering: Sidecar) -> None:
    worker = remembering.connect()
    worker.send([1.0, 10.0, 2.0])
    wait_for(written(remembering, "SELECT 1 FROM marks"), 10)
    before = resource.prlimit(remembering.pid, resource.RLIMIT_FSIZE)
    # No file may grow beyond what the log has: to SQLite that is a disk that takes nothing more.
    resource.prlimit(remembering.pid, resource.RLIMIT_FSIZE, (16384, before[1]))
    worker.send([1.0, 700.0, 2.0])
    wait_for(lambda: metric(remembering, "maxact_state_errors_total") >= 2, 10)
    assert marks(remembering)["hidden"] == 700.0
    assert remembering.log.read_text().count("state not written") == 1
    resource.prlimit(remembering.pid, resource.RLIMIT_FSIZE, before)
    wait_for(written(remembering, "SELECT 1 FROM marks WHERE absmax = 700.0"), 10)
    assert "state is written again" in remembering.log.read_text()


def start_error(*options: str) -> str:
    command = [program("maxact"), "sidecar", "--grpc", f"127.0.0.1:{free_port()}", "--http", "127.0.0.1:0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert start_error("--state", str(tmp_path / "file")) == f"error: state: {tmp_path}/file: File exists\n"
    assert start_error("--state", "/proc/maxact") == "error: state: /proc/maxact: No such file or directory\n"


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    mounted = subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a read-only mount needs root with mounts allowed")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    with read_only(tmp_path):
        assert start_error("--state", str(tmp_path)) == f"error: state: {tmp_path}: Read-only file system\n"


def test_a_damaged_state_does_not_keep_a_sidecar_from_starting(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a database" * 1000)
    sidecar = Sidecar(tmp_path / "log", "--state", str(tmp_path))
    try:
        sidecar.connect().send(1.0)
        assert "state was damaged: kept as" in sidecar.log.read_text()
    finally:
        sidecar.stop()


def test_configured_cards_win_over_loaded_ones(remembering: Sidecar, tmp_path: Path) -> None:
    remembering.connect().send([1.0, 10.0, 2.0])
    (tmp_path / "configured.json").write_text(httpx.get(f"{remembering.url}/api/v1/card").text)
    remembering.use_live_state_as_card()
    remembering.stop()
    remembering._command += ["--card", str(tmp_path / "configured.json")]
    remembering.start()
    assert [card["name"] for card in remembering.get("cards")] == ["configured"]
    assert "gives way to the configured one" in remembering.log.read_text()
