"""``make e2e-alert``: from a prompt to a notification, with real servers all the way.

    PYTHONPATH=. python scripts/e2e_alert.py

vLLM (compiled) -> plugin -> sidecar -> Prometheus -> Alertmanager -> webhook. Calm prompts make the card; then
prompts are sent until one leaves its range. Ends with a last line ``RESULT {...}``: ``spike_to_metric_s`` (from the
first token that answers that prompt, which its spike comes just before, to the flag in the sidecar's /metrics),
``request_to_metric_s`` (from sending the prompt), ``spike_to_prometheus_s``, ``spike_to_notification_s`` (to the
webhook), ``queries_with_data`` ("N/N": every query and variable of every dashboard and every recording rule, against
that Prometheus; tables at that moment, the rest since its start), ``rules`` ("N/N" evaluated without an error),
``alerts`` (names of those that fired) and ``ok``. Exit status 1 where a target is missed: metric within the plugin's
interval + 0.5 s, notification within 15 s at 1 s scrapes and evaluations, every query with data, every rule healthy,
every alert of `PROVOKED` raised. `LEFT_OUT` says why the other alerts are not.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import httpx
import watchers
from demo import CALM, DIVERSE
from grafana.assets import RECORDED, all_queries

from maxact_calibration import model as smol

INTERVAL_SECONDS: Final = 0.5
METRIC_SECONDS: Final = INTERVAL_SECONDS + 0.5
NOTIFICATION_SECONDS: Final = 15.0
START_SECONDS: Final = 900.0
OF_THE_MODEL: Final = {"MaxactResolutionLost"}
"""What this model's outliers raise with any traffic, calm or not."""
CALM_TOKENS: Final = 48
"""Of each calm answer: `resolution` is judged from 256 tokens on."""
PROVOKED: Final = {
    "MaxactRangeExceeded",
    "MaxactResolutionLost",
    "MaxactSaturation",
    "MaxactFp16OverflowNear",
    "MaxactNonfiniteActivations",
}
LEFT_OUT: Final = {
    "MaxactDriftRising": "compares with the day before",
    "MaxactStreamDown": "waits for a minute",
    "MaxactSidecarDown": "waits for a minute, and nothing could be asked any more",
    "MaxactSidecarVanished": "waits for a minute, and nothing could be asked any more",
    "MaxactSeriesDropped": "a cap as low as that would leave panels without data",
}
"""Alerts that are raised by rule tests only (`grafana/rules/maxact.rules.test.yaml`), and why not here."""
STARTED: Final = time.monotonic()
RAISED: Final = 'meaning="range"'
FLAG: Final = f"maxact_headroom_flag{{{RAISED}}}"


class E2eError(RuntimeError):
    """What stopped the run, for the person who started it."""


def main() -> None:
    """Run, print RESULT; status 1 where a target is missed, 2 where the run could not go on."""
    try:
        if missing := watchers.missing_programs():
            raise E2eError(f"not installed: {', '.join(missing)} (Debian packages prometheus, prometheus-alertmanager)")
        with tempfile.TemporaryDirectory(prefix="maxact-e2e-") as folder, ExitStack() as stack:
            result = run(Path(folder), stack)
    except (E2eError, smol.ModelError, watchers.ServerError, httpx.HTTPError) as error:
        print(f"e2e-alert: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    print("RESULT " + json.dumps(result), flush=True)
    sys.exit(0 if result["ok"] else 1)


def run(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The whole way once; RESULT."""
    webhook = stack.enter_context(watchers.run_webhook())
    alertmanager = stack.enter_context(watchers.run_alertmanager(folder, webhook))
    api, page, receiver = (f"127.0.0.1:{watchers.free_port()}" for _ in range(3))
    serve(folder, stack, api=api, page=page, receiver=receiver)
    prometheus = stack.enter_context(watchers.run_prometheus(folder, target=page, alertmanager=alertmanager))
    watchers.send_foreign_layout(receiver)
    scaled = Scaled(receiver)
    within(60, "a site with a static scale in Prometheus", lambda: scaled.seen(prometheus))
    calibrate(api, page, prometheus)
    say("prompts of other kinds")
    times = provoke(api, page, prometheus, webhook)
    say("every query and rule is asked")
    num_queries, empty = ask_everything(prometheus, scaled)
    rules = prometheus.rules()
    broken = [f"{rule['name']}: {rule.get('lastError')}" for rule in rules if rule["health"] != "ok"]
    fired = strain(scaled, webhook)
    for problem in (
        *(f"no data: {where}" for where in empty),
        *broken,
        *(f"not raised: {n}" for n in PROVOKED - fired),
    ):
        say(problem)
    in_time = times["spike_to_metric_s"] <= METRIC_SECONDS and times["spike_to_notification_s"] <= NOTIFICATION_SECONDS
    return {
        "ok": in_time and not empty and not broken and fired >= PROVOKED,
        **times,
        "queries_with_data": f"{num_queries - len(empty)}/{num_queries}",
        "rules": f"{len(rules) - len(broken)}/{len(rules)}",
        "alerts": sorted(fired),
    }


def say(words: str) -> None:
    """One line of progress, with the seconds since the start of this program."""
    print(f"[{time.monotonic() - STARTED:5.0f} s] {words}", file=sys.stderr, flush=True)


def serve(folder: Path, stack: ExitStack, *, api: str, page: str, receiver: str) -> None:
    """vLLM with the plugin, and the sidecar, until the stack closes."""
    say("the model (converted once)")
    command: list[str | Path] = [Path(sys.executable).with_name("maxact"), "serve", str(smol.smollm2())]
    command += ["--http", page, "--grpc", receiver, "--hold", "60", "--maxact-interval", str(INTERVAL_SECONDS)]
    command += ["--host", "127.0.0.1", "--port", api.rpartition(":")[2], "--served-model-name", smol.NAME]
    command += ["--max-model-len", "1024", "--max-num-seqs", "16", "--max-num-batched-tokens", "2048"]
    say("vLLM starts and compiles")
    running = watchers.process(
        command,
        ready=f"http://{api}/health",
        log=folder / "serve.log",
        seconds=START_SECONDS,
        environ={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
    )
    stack.enter_context(running)


class Scaled:
    """A worker of a model with a static scale, which is none of vLLM's: this machine has no such model."""

    def __init__(self, receiver: str) -> None:
        self._receiver = receiver
        self._numbers = itertools.count(1)

    def send(self, *, absmax: float = 10, nonfinite: int = 0) -> None:
        """One window, and time for a scrape and an evaluation."""
        watchers.send_scaled_window(self._receiver, next(self._numbers), absmax=absmax, nonfinite=nonfinite)
        time.sleep(1)

    def seen(self, prometheus: watchers.Prometheus) -> bool:
        """Send until Prometheus has one: a busy machine misses scrapes."""
        self.send()
        return bool(prometheus.query("maxact_saturation_ratio"))


def calibrate(api: str, page: str, prometheus: watchers.Prometheus) -> None:
    """Make the calm prompts the card. Raises `E2eError` where their traffic is not silent afterwards."""
    say("calm prompts make the card")
    for prompt in CALM:
        complete(api, prompt, tokens=CALM_TOKENS)
    time.sleep(3 * INTERVAL_SECONDS)
    card = httpx.get(f"http://{page}/api/v1/card", params={"model": smol.NAME}).raise_for_status().json()
    httpx.post(f"http://{page}/api/v1/cards", json=card).raise_for_status()
    complete(api, CALM[0])
    within(10, "sites judged against the card", lambda: prometheus.query(FLAG))
    time.sleep(3)
    if firing := {alert["labels"]["alertname"] for alert in prometheus.firing()} - OF_THE_MODEL:
        raise E2eError(f"calm traffic fired {sorted(firing)}")


def provoke(api: str, page: str, prometheus: watchers.Prometheus, webhook: watchers.Webhook) -> dict[str, float]:
    """Send prompts until one leaves the card's range; seconds from its first token to each station."""
    for kind, prompt in DIVERSE.items():
        sent = time.monotonic()
        with ThreadPoolExecutor(1) as sender:
            answered = sender.submit(first_token, api, prompt)
            flagged = time_of_flag(page, answered)
        if flagged is None:
            continue
        say(f"{kind} left the range")
        spike = answered.result()
        scraped = within(10, "the flag in Prometheus", lambda: prometheus.query(f"{FLAG} == 1"), since=spike)
        within(60, "a notification", lambda: webhook.find("MaxactRangeExceeded", "firing"))
        first = min(alert["received"] for alert in webhook.find("MaxactRangeExceeded", "firing"))
        return {
            "spike_to_metric_s": round(flagged - spike, 2),
            "request_to_metric_s": round(flagged - sent, 2),
            "spike_to_prometheus_s": round(scraped, 2),
            "spike_to_notification_s": round(first - spike, 2),
        }
    raise E2eError("no prompt left the calibrated range")


def first_token(api: str, prompt: str) -> float:
    """Steady seconds at which the answer began: the prompt had just gone through the model."""
    body = request(prompt, tokens=2) | {"stream": True}
    with httpx.stream("POST", f"http://{api}/v1/completions", json=body, timeout=120) as answer:
        answer.raise_for_status()
        lines = answer.iter_lines()
        next(lines)
        begun = time.monotonic()
        for _ in lines:
            pass
    return begun


def time_of_flag(page: str, answered: Future[float]) -> float | None:
    """Steady seconds at which /metrics had a raised range flag; None where it had none three seconds after the answer
    began."""
    while not raised(page):
        if answered.done() and time.monotonic() > answered.result() + 3:
            return None
        time.sleep(0.02)
    return time.monotonic()


def strain(scaled: Scaled, webhook: watchers.Webhook) -> set[str]:
    """Raise what no prompt raises; names of all that were notified."""
    say("a worker saturates, overflows fp16 and has a NaN")

    def notified() -> set[str]:
        return {alert["labels"]["alertname"] for alert in webhook.received if alert["status"] == "firing"}

    def seen() -> bool:
        scaled.send(absmax=1e5, nonfinite=1)
        return notified() >= PROVOKED

    seconds_until(seen, since=time.monotonic(), limit=60)
    return notified()


def complete(api: str, prompt: str, *, tokens: int = 2) -> None:
    """Have an answer of so many tokens made: the prompt went through the model when this returns."""
    httpx.post(f"http://{api}/v1/completions", json=request(prompt, tokens=tokens), timeout=120).raise_for_status()


def request(prompt: str, *, tokens: int) -> dict[str, Any]:
    """The body of a completion."""
    return {"model": smol.NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def raised(page: str) -> bool:
    """True where the sidecar's /metrics shows a raised range flag."""
    lines = httpx.get(f"http://{page}/metrics").raise_for_status().text.splitlines()
    return any(
        line.startswith("maxact_headroom_flag{") and RAISED in line and float(line.rpartition(" ")[2]) == 1
        for line in lines
    )


def seconds_until(condition: Callable[[], object], *, since: float, limit: float) -> float | None:
    """Steady seconds after ``since`` at which the condition held; None where it did not within ``limit``."""
    while not condition():
        if time.monotonic() - since > limit:
            return None
        time.sleep(0.02)
    return time.monotonic() - since


def within(limit: float, what: str, condition: Callable[[], object], *, since: float | None = None) -> float:
    """Like `seconds_until`, from now unless ``since`` is given. Raises `E2eError`."""
    seconds = seconds_until(condition, since=time.monotonic() if since is None else since, limit=limit)
    if seconds is None:
        raise E2eError(f"not within {limit:g} s: {what}")
    return seconds


def ask_everything(prometheus: watchers.Prometheus, scaled: Scaled) -> tuple[int, list[str]]:
    """How many queries and recorded series there are, and those without data: a table now, the rest since the start of
    this Prometheus. For half a minute windows with a static scale go on: the sidecar lets go of an idle worker's."""
    questions = {query.where: (query.runnable, query.instant) for query in all_queries()}
    questions |= {name: (name, False) for name in RECORDED}
    empty = list(questions)

    def answered() -> bool:
        scaled.send()
        for where in empty.copy():
            expr, instant = questions[where]
            if prometheus.query(expr) if instant else prometheus.query_range(expr):
                empty.remove(where)
        return not empty

    seconds_until(answered, since=time.monotonic(), limit=30)
    return len(questions), empty


if __name__ == "__main__":
    main()
