"""The sidecar dies at random times: no extremum is lost.

Twice: under the plugin's own streams fed by the test, many windows a second to a killed and an undisturbed sidecar at
once; and under a real vLLM engine, against the tensors themselves.
"""

from __future__ import annotations

import random
import sqlite3
import subprocess
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from engines import NATIVE, results, start_engine
from processes import Sidecar, wait_for
from workers import SITES, layout, window

from maxact_proto import stats, wire
from maxact_sidecar.store import FILE
from maxact_vllm.config import Settings
from maxact_vllm.stream import Outbox, Streamer

NUM_KILLS = 4


class Rank:
    """One worker that sends the same windows to several sidecars, through the plugin's own outboxes and streams."""

    def __init__(self, own: wire.Layout, seed: int, sidecars: list[Sidecar]) -> None:
        self._random = np.random.default_rng(seed)
        self._lifetime = stats.empty(len(SITES))[..., : stats.NUM_EXTREMA]
        self.outboxes = [Outbox(len(SITES)) for _ in sidecars]
        self._streamers = [
            Streamer(Settings(endpoint=sidecar.grpc), own, outbox)
            for sidecar, outbox in zip(sidecars, self.outboxes, strict=True)
        ]
        for streamer in self._streamers:
            streamer.start()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._produce)
        self._thread.start()

    def _produce(self) -> None:
        while not self._over.wait(0.02):
            # Heavy tails: the largest value comes at any time, and once.
            peaks = np.exp(4 * self._random.normal(size=len(SITES)))
            own = window(1, peaks)
            self._lifetime[..., stats.MAX] = np.maximum(self._lifetime[..., stats.MAX], own.values[..., stats.MAX])
            self._lifetime[..., stats.MIN] = np.minimum(self._lifetime[..., stats.MIN], own.values[..., stats.MIN])
            own.lifetime = self._lifetime.copy()
            for outbox in self.outboxes:
                outbox.put(own)

    def stop(self) -> None:
        """No more windows; all are acknowledged."""
        self._over.set()
        self._thread.join()
        for outbox in self.outboxes:
            assert outbox.wait_until_sent(60)
        for streamer in self._streamers:
            streamer.stop()
            streamer.join(10)


def extrema(sidecar: Sidecar) -> list[tuple[object, ...]]:
    """Of the workers' lifetime, from the card, and the marks of all time; floats as they are, bit for bit."""
    card = [
        (site["layer"], site["site"], site["phase"], site["min"], site["max"]) for site in sidecar.get("card")["sites"]
    ]
    marks = [
        (site["layer"], site["site"], *(site["phases"][phase]["absmax_high_water"] for phase in stats.PHASES))
        for site in sidecar.get("sites")
    ]
    return card + marks


def test_killed_at_random_times_it_ends_with_the_extrema_of_an_undisturbed_run(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201
    chance = random.Random(seed)
    killed = Sidecar(tmp_path / "killed.log", "--state", str(tmp_path / "state"))
    undisturbed = Sidecar(tmp_path / "undisturbed.log")
    try:
        for number, instance in enumerate(("first", "second")):
            ranks = [
                Rank(
                    layout(instance=instance, tp_rank=rank, tp_size=2), seed + 2 * number + rank, [killed, undisturbed]
                )
                for rank in range(2)
            ]
            for _ in range(NUM_KILLS // 2):
                time.sleep(chance.uniform(0.0, 2.5))
                killed.kill()
                time.sleep(chance.uniform(0.0, 0.5))
                killed.start()
            for rank in ranks:
                rank.stop()
            assert extrema(killed) == extrema(undisturbed)
            wait_until_written(killed, tmp_path / "state")
    finally:
        killed.stop()
        undisturbed.stop()


def wait_until_written(sidecar: Sidecar, state: Path) -> None:
    """Workers that are gone send nothing again: from here on their marks are the file's."""
    shown = {site["phases"]["prefill"]["absmax_high_water"] for site in sidecar.get("sites")}

    def is_written() -> bool:
        with closing(sqlite3.connect(state / FILE)) as connection:
            return shown == {absmax for (absmax,) in connection.execute("SELECT absmax FROM marks")}

    wait_for(is_written, 10)


LENGTH, DECODED, NUM_BATCHES = 24, 12, 15


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_killed_under_real_vllm_traffic_it_ends_with_the_extrema_of_the_tensors(
    tmp_path: Path, tiny_llama: Path
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201
    chance, tokens = random.Random(seed), np.random.default_rng(seed)
    batch = {"max_tokens": DECODED}
    spec = {
        "llm": {"model": str(tiny_llama), "max_model_len": 128, "skip_tokenizer_init": True, **NATIVE},
        "raw": True,
        "batches": [batch | {"prompts": tokens.integers(0, 256, (4, LENGTH)).tolist()} for _ in range(NUM_BATCHES)],
        "pause_seconds": 2.0,
        "linger_seconds": 15,
    }
    sidecar = Sidecar(tmp_path / "sidecar.log", "--state", str(tmp_path / "state"))
    engine = start_engine(spec, tmp_path, sidecar.grpc)
    try:
        wait_for(lambda: engine.poll() is not None or "engine up" in (tmp_path / "log").read_text(), 600)
        kills = 0
        while not is_over(engine, tmp_path):
            wait_for(lambda: is_over(engine, tmp_path) or is_connected(sidecar), 60)
            time.sleep(chance.uniform(0.0, 2.0))
            sidecar.kill()
            time.sleep(chance.uniform(0.0, 1.0))
            sidecar.start()
            kills += 1
        print(f"{kills} kills")  # noqa: T201
        engine.wait(120)
        raw, _ = results(engine, tmp_path)
        assert kills >= 3, "the traffic was over too soon"
        check_against_the_tensors(sidecar, raw)
    finally:
        engine.kill()
        sidecar.stop()


def is_over(engine: subprocess.Popen[bytes], folder: Path) -> bool:
    """The engine is about to end, or did. The last batches are for a sidecar that lives: a card needs tokens."""
    served = (folder / "log").read_text().count("served a batch")
    return engine.poll() is not None or served >= NUM_BATCHES - 3


def is_connected(sidecar: Sidecar) -> bool:
    """The worker found the sidecar since its last start."""
    return "worker connected" in sidecar.log.read_text().rpartition("sidecar ready")[2]


def check_against_the_tensors(sidecar: Sidecar, raw: dict[str, np.ndarray]) -> None:
    """Lifetime extrema of all sites and phases, and the marks of all time, bit for bit."""
    position = raw.pop("positions")
    rows = {"first": position == 0, "prefill": (position > 0) & (position < LENGTH), "decode": position >= LENGTH}
    card = sidecar.get("card")["sites"]
    marks = {(site["layer"], site["site"]): site["phases"] for site in sidecar.get("sites")}
    assert len(card) == len(marks) * len(rows) == 36
    for site in card:
        name = f"{'-' if site['layer'] is None else site['layer']}.{site['site']}"
        top, bottom = raw[name][rows[site["phase"]]].T
        assert (site["max"], site["min"]) == (top.max(), bottom.min()), (name, site["phase"])
        high_water = marks[site["layer"], site["site"]][site["phase"]]["absmax_high_water"]
        assert high_water == max(top.max(), -bottom.min()), (name, site["phase"])
