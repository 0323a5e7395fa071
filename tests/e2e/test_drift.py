"""Does traffic of another domain leave the range of a card? Real weights, a real vLLM, a real sidecar.

A card is made from English prose; then come more English prose, code, other languages, a long context and the model's
special tokens. What moved and what did not is printed as a table; asserted is only what does not hang on single values.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from domains import CALIBRATION, CODE, LANGUAGES, LONG, MORE
from processes import Sidecar

from maxact_proto import stats

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

HOLD = 2.0
DECODED = 6
THRESHOLD = 0.9
MASSIVE = range(11, 29)
"""Layers whose residual stream carries SmolLM2's massive activation."""
ENVIRON = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
Site = tuple[int | None, str]


class Served:
    """`serve_prompts.py`, its engine observed by a sidecar."""

    def __init__(self, model: Path, sidecar: Sidecar, log: Path) -> None:
        command = [sys.executable, Path(__file__).with_name("serve_prompts.py"), model, sidecar.grpc]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, stdin=-1, stdout=-1, stderr=file, text=True, env={**os.environ, **ENVIRON}
            )
        self._log = log
        self.special: list[int] = self._answer()["special"]

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, self._log.read_text()[-4000:]
        return json.loads(line)

    def ask(self, prompts: Any, max_tokens: int) -> int:
        """Serve prompts; how many tokens they have."""
        assert self._process.stdin
        print(json.dumps({"prompts": prompts, "max_tokens": max_tokens}), file=self._process.stdin, flush=True)
        tokens: int = self._answer()["tokens"]
        return tokens

    def stop(self) -> None:
        """End the engine."""
        self._process.communicate(timeout=60)


@dataclass(frozen=True, slots=True)
class Domain:
    """What one domain did: when it was served, and by site the absmax over that of the card."""

    name: str
    tokens: int
    begun: float
    ended: float
    used: dict[Site, float]
    exceeded: dict[Site, set[str]]
    """Sites whose ``range`` flag says that windows of this domain exceeded it, and the phases they did it in."""

    @property
    def beyond(self) -> dict[Site, float]:
        """Sites that it took beyond the flag's threshold."""
        return {site: used for site, used in self.used.items() if used > 1 / THRESHOLD}


@dataclass(frozen=True, slots=True)
class Course:
    """All domains, and what the sidecar says in the end."""

    domains: dict[str, Domain]
    flags: list[dict[str, Any]]
    scrape: str
    log: str


def place(item: dict[str, Any]) -> Site:
    return item["layer"], item["site"]


def counted(sidecar: Sidecar) -> dict[Site, dict[str, int]]:
    """Windows that exceeded ``range`` so far, by site and phase."""
    flags = [flag for flag in sidecar.get("flags") if flag["meaning"] == "range"]
    return {place(flag): flag["phases_exceeded"] for flag in flags}


def settle() -> float:
    """Wait until nothing of the traffic before is within the hold horizon; the time then."""
    time.sleep(HOLD + 1.5)
    return time.time()


def observe(name: str, served: Served, sidecar: Sidecar, limits: dict[Site, float], prompts: Any) -> Domain:
    """Serve one domain and gather what the sidecar saw of it."""
    before = counted(sidecar)
    begun = time.time()
    tokens = served.ask(prompts, DECODED)
    ended = settle()
    history = sidecar.get("history")
    rows = [row for row, seconds in enumerate(history["times"]) if begun - 0.5 <= seconds <= ended]
    peaks = {
        place(site): max((site["absmax"][row] for row in rows if site["absmax"][row] is not None), default=0.0)
        for site in history["sites"]
    }
    used = {site: peak / limits[site] for site, peak in peaks.items()}
    exceeded = {
        site: {phase for phase, n in windows.items() if n > before.get(site, {}).get(phase, 0)}
        for site, windows in counted(sidecar).items()
        if windows != before.get(site)
    }
    return Domain(name, tokens, begun, ended, used, exceeded)


@pytest.fixture(scope="module")
def course(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    folder = tmp_path_factory.mktemp("drift")
    sidecar = Sidecar(folder / "sidecar.log", "--hold", f"{HOLD:g}", "--flag-hold", "0")
    served = Served(smollm2, sidecar, folder / "vllm.log")
    try:
        served.ask(CALIBRATION, DECODED)
        settle()
        card = sidecar.get("card")
        httpx.post(f"{sidecar.url}/api/v1/cards", json=card).raise_for_status()
        limits: dict[Site, float] = {}
        for site in card["sites"]:
            limits[place(site)] = max(site["absmax"], limits.get(place(site), 0.0))
        special = [[each] for each in served.special] + [served.special, served.special[:1] * 40]
        domains = {
            name: observe(name, served, sidecar, limits, prompts)
            for name, prompts in (
                ("more English prose", MORE),
                ("code", CODE),
                ("other languages", LANGUAGES),
                ("long context", [LONG]),
                ("special tokens", special),
            )
        }
        yield Course(domains, sidecar.get("flags"), sidecar.scrape(), sidecar.log.read_text())
    finally:
        served.stop()
        sidecar.stop()


def row(domain: Domain) -> str:
    used = sorted(domain.used.values())
    layer, name = max(domain.used, key=lambda site: domain.used[site])
    massive = [domain.used[layer, "hidden"] for layer in MASSIVE]
    phases = [sum(phase in each for each in domain.exceeded.values()) for phase in stats.PHASES]
    return (
        f"{domain.name:<20}{domain.tokens:>7}{len(domain.beyond):>9}{sum(each <= 1 for each in used):>8}"
        f"{used[len(used) // 2]:>8.2f}{used[-1]:>9.2f}  {'-' if layer is None else layer:>2} {name:<17}"
        f"{min(massive):>6.2f} to {max(massive):.2f}   {'/'.join(map(str, phases))}"
    )


def test_what_moved_and_what_did_not(course: Course, capsys: Any) -> None:
    head = (
        f"{'absmax over card':<20}{'tokens':>7}{'flagged':>9}{'inside':>8}{'median':>8}{'largest':>9}{'':<22}"
        f"{'massive':<15}flagged in {'/'.join(stats.PHASES)}"
    )
    with capsys.disabled():
        sys.stdout.write("\n".join(["", head, *(row(domain) for domain in course.domains.values()), ""]))
    for domain in course.domains.values():
        assert len(domain.used) == 152
        assert min(domain.used.values()) > 0.1, "every site saw this domain"


def test_other_traffic_leaves_the_range_at_more_sites_than_more_of_the_same(course: Course) -> None:
    same, *others = course.domains.values()
    assert len(same.beyond) < 0.1 * len(same.used)
    for domain in others:
        assert len(domain.beyond) > 2 * len(same.beyond), domain.name


def test_massive_activations_move_with_the_language_and_not_with_length_or_code(course: Course) -> None:
    for layer in MASSIVE:
        assert "first" in course.domains["other languages"].exceeded[layer, "hidden"]
        for name in ("more English prose", "code", "long context", "special tokens"):
            assert (layer, "hidden") not in course.domains[name].exceeded, (name, layer)


def test_special_tokens_have_embeddings_that_prose_has_not(course: Course) -> None:
    embedding = (None, "embedding")
    assert course.domains["special tokens"].used[embedding] > 1.3
    assert course.domains["more English prose"].used[embedding] < 1


def test_the_flags_name_the_sites_that_left_the_range(course: Course) -> None:
    for domain in course.domains.values():
        assert set(domain.exceeded) == set(domain.beyond), domain.name


def test_evidence_says_since_when_how_often_and_in_which_phases(course: Course) -> None:
    ranges = [flag for flag in course.flags if flag["meaning"] == "range"]
    assert {place(flag) for flag in ranges} == set().union(*(domain.beyond for domain in course.domains.values()))
    for flag in ranges:
        first = next(domain for domain in course.domains.values() if place(flag) in domain.exceeded)
        assert first.begun <= flag["first_exceeded"] <= first.ended, place(flag)
        seen = set().union(*(domain.exceeded.get(place(flag), set()) for domain in course.domains.values()))
        assert seen == {phase for phase, n in flag["phases_exceeded"].items() if n}
        assert flag["phase"] in seen
        assert 0 < flag["exceeded_ratio"] == flag["windows_exceeded"] / flag["windows"] <= 1
        assert (
            max(flag["phases_exceeded"].values()) <= flag["windows_exceeded"] <= sum(flag["phases_exceeded"].values())
        )
    assert min(flag["exceeded_ratio"] for flag in ranges) < 0.1, "some were a single window, and stay in evidence"


def test_metrics_and_log_say_the_same(course: Course) -> None:
    [flag] = [flag for flag in course.flags if flag["meaning"] == "range" and place(flag) == (None, "embedding")]
    series = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in course.scrape.splitlines()
        if line.startswith("maxact_headroom_") and 'site="embedding",meaning="range"' in line
    }
    labels = next(name for name in series if name.startswith("maxact_headroom_windows_total")).partition("{")[2]
    assert series[f"maxact_headroom_windows_total{{{labels}"] == flag["windows"]
    assert series[f"maxact_headroom_windows_exceeded_total{{{labels}"] == flag["windows_exceeded"]
    assert series[f"maxact_headroom_first_exceeded_timestamp_seconds{{{labels}"] == flag["first_exceeded"]
    for phase, windows in flag["phases_exceeded"].items():
        name = f'maxact_headroom_phase_windows_exceeded_total{{{labels[:-1]},phase="{phase}"}}'
        assert series[name] == windows
    raised = [
        line
        for line in map(json.loads, course.log.splitlines())
        if line["message"].startswith("flag raised meaning=range") and line["site"] == "embedding"
    ]
    assert (raised[0]["windows_exceeded"], raised[0]["windows"]) == (1, 1)
    assert {line["first_exceeded"] for line in raised} == {raised[0]["first_exceeded"]}
