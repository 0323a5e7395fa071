"""The sidecar dies at random times under the plugin's own streams: no extremum is lost."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from processes import Sidecar, wait_for
from workers import SITES, layout, window

from maxact_proto import stats, wire
from maxact_sidecar.store import FILE
from maxact_vllm.stream import Outbox, Streamer

NUM_KILLS = 4


class Rank:
    """One worker that sends the same windows to several sidecars, through the plugin's own outboxes and streams."""

    def __init__(self, own: wire.Layout, seed: int, sidecars: list[Sidecar]) -> None:
        self._random = np.random.default_rng(seed)
        self._lifetime = stats.empty(len(SITES))[..., : stats.NUM_EXTREMA]
        self.outboxes = [Outbox(len(SITES)) for _ in sidecars]
        self._streamers = [
            Streamer(sidecar.grpc, own, outbox) for sidecar, outbox in zip(sidecars, self.outboxes, strict=True)
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
