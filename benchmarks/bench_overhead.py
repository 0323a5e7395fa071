"""What observing costs: several engines in one process, taking turns, every engine step timed.

    python benchmarks/bench_overhead.py --model DIR [--columns base,serving,base2,all,eager] [--batches 1,8,32]

Columns: ``base`` and ``base2`` are the same engine twice (the difference between the two is the noise of the method),
``serving``/``paper``/``all`` observe that preset and stream to a receiver on loopback, ``eager`` is vLLM without
torch.compile and CUDA graphs. A digit behind any of them makes one more engine of its kind. All engines live side by
side and answer the same requests at the same time, a few steps each in turn (``--turn``), in an order that is turned by
one every time: so a neighbour on the machine, its clocks and its heat meet all columns alike. The first two steps of a
turn are left out: they find the caches full of another engine, and under async scheduling its last step still on the
GPU.

The figure of a column is the median of the ratios (its seconds of a turn / base's seconds of the same turn); beside it
stand their interquartile range and the 95 % confidence interval of the median. A turn of prefill is one long prompt.

Flushing happens once a second on a thread of its own, which no median sees: its share of one core is given by itself.

What an observing engine does on the model's thread, by torch's profile of a decode step, beyond what ``base`` does, is
printed as well: ``maxact::observe`` once per group of layers and one ``maxact::fold`` (SmolLM2 on a CPU: four or, for
``all``, eight, and one); no tensor is allocated or copied, nothing waits.

Last line: ``RESULT {"serving_overhead_pct": .., "all_overhead_pct": .., "eager_overhead_pct": .., "noise_pct": ..}``:
the worst batch of each column, decode and prefill, in percent over base; keys only for columns that ran.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PRESETS = ("serving", "paper", "all")
STARTED = time.monotonic()
EDGE_STEPS = 4
"""At either end of a round, where prompts are read and requests begin to be done."""


def main() -> None:
    """Build the engines, let them take turns, print the table."""
    args = _parse()
    if "maxact" in os.environ.get("VLLM_PLUGINS", ""):
        raise SystemExit("VLLM_PLUGINS asks for maxact, so every column would be observed: leave maxact out of it")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # a share of what is free fails for the second engine
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "vllm_plugin"))
    from receiver import Listening

    with contextlib.ExitStack() as stack:
        receivers = {column: stack.enter_context(Listening()) for column in args.columns if _kind(column) in PRESETS}
        with _windows_later():
            engines = {column: _engine(column, args, receivers.get(column)) for column in args.columns}
        rows = []
        for batch in args.batches:
            rows += _report(_decode(engines, batch, args), args.out)
        rows += _report(_prefill(engines, args), args.out)
        for column, listening in receivers.items():
            print(json.dumps({"kind": "observed", "column": column, **_observed(listening.receiver)}), flush=True)
        for column in receivers:
            added = _added(engines["base"], engines[column], args)
            print(json.dumps({"kind": "profile", "column": column, "added_per_step": added}), flush=True)
        print(json.dumps({"kind": "background", "core_pct_per_engine": _background(len(receivers))}), flush=True)
    print("RESULT " + json.dumps(_result(rows, args.columns)), flush=True)
    os._exit(0)  # engines of one process take long to tear down, and nothing is left to save


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--columns", type=lambda text: text.split(","), default=["base", "serving", "base2", "all", "eager"]
    )
    parser.add_argument("--batches", type=lambda text: [int(size) for size in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=64, help="decode steps of a round")
    parser.add_argument("--turn", type=int, default=8, help="steps of one engine before the next one's")
    parser.add_argument(
        "--seconds", type=float, default=240, help="for each batch and for prefill; three rounds at least"
    )
    parser.add_argument("--prompt", type=int, default=16, help="prompt tokens of decode batches")
    parser.add_argument("--prefill", type=int, default=512, help="prompt tokens of a prefill")
    parser.add_argument("--memory", type=float, default=None, help="gpu_memory_utilization of each engine, on a GPU")
    parser.add_argument("--dummy", action="store_true", help="random weights (shapes only)")
    parser.add_argument("--capture-sizes", type=lambda text: [int(size) for size in text.split(",")], default=None)
    parser.add_argument("--out", default="", help="append rows as JSON lines")
    args = parser.parse_args()
    if args.turn < 3:
        parser.error(f"--turn {args.turn}: the first two steps of a turn are left out, so it takes three at least")
    if args.steps < args.turn + 2 * EDGE_STEPS:
        parser.error(f"--steps {args.steps}: a turn and both ends of a round take {args.turn + 2 * EDGE_STEPS}")
    return args


@contextlib.contextmanager
def _windows_later() -> Iterator[None]:
    """Flushers of engines that come up in here start at its end: while one engine captures its CUDA graphs, no other
    thread of the process may use the GPU."""
    from maxact_vllm.flush import Flusher

    waiting: list[Flusher] = []
    start = Flusher.start
    Flusher.start = lambda self: waiting.append(self)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Flusher.start = start  # type: ignore[method-assign]
        for flusher in waiting:
            flusher.start()


def _observed(receiver: Any) -> dict[str, int]:
    """What came out of an engine that observes, in the windows until now. Raises where that is nothing."""
    from maxact_proto import stats

    maxima = receiver.total()[..., stats.MAX].max(axis=0)
    seen = {"tokens": sum(receiver.tokens()), "sites": len(maxima), "silent": int((maxima == -float("inf")).sum())}
    if not seen["tokens"] or seen["silent"]:
        raise SystemExit(f"nothing was measured: {seen}")
    return seen


def _background(engines: int) -> float:
    """CPU time of maxact's threads, those that close windows and those that send them, in percent of a core."""
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("maxact-")]
    seconds = sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident)) for thread in ours if thread.ident)
    return round(100 * seconds / (time.monotonic() - STARTED) / max(engines, 1), 2)


def _kind(column: str) -> str:
    return column.rstrip("0123456789")


def _engine(column: str, args: argparse.Namespace, listening: Any) -> Any:
    from vllm import LLM

    kwargs: dict[str, Any] = {}
    if listening:
        kwargs["additional_config"] = {"maxact": {"sites": _kind(column), "endpoint": listening.endpoint}}
    if args.memory:
        kwargs["gpu_memory_utilization"] = args.memory
    if args.dummy:
        kwargs["load_format"] = "dummy"
    if args.capture_sizes and _kind(column) != "eager":
        kwargs["compilation_config"] = {"cudagraph_capture_sizes": args.capture_sizes}
    started = time.monotonic()
    engine = LLM(
        model=args.model,
        skip_tokenizer_init=True,
        max_model_len=max(args.prefill + 16, args.prompt + args.steps + 32),
        max_num_seqs=max(*args.batches, 8),
        max_num_batched_tokens=max(2048, args.prefill + 16),
        enforce_eager=_kind(column) == "eager",
        enable_prefix_caching=False,
        disable_log_stats=True,
        **kwargs,
    ).llm_engine
    print(json.dumps({"kind": "start", "column": column, "seconds": round(time.monotonic() - started, 1)}), flush=True)
    return engine


def _add(engine: Any, batch: int, prompt: int, steps: int, seed: int) -> None:
    """``batch`` requests that the engine answers with ``steps`` tokens each."""
    from vllm import SamplingParams, TokensPrompt

    draw = random.Random(seed)
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    sampling = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False)
    for index in range(batch):
        tokens = [draw.randrange(10, vocabulary - 10) for _ in range(prompt)]
        engine.add_request(f"{seed}-{index}", TokensPrompt(prompt_token_ids=tokens), sampling)


def _steps(engine: Any, most: int) -> list[float]:
    """Seconds of each of the next ``most`` engine steps, of fewer where all requests are answered before."""
    seconds = []
    now = time.perf_counter()
    while len(seconds) < most and engine.has_unfinished_requests():
        engine.step()
        now, before = time.perf_counter(), now
        seconds.append(now - before)
    return seconds


def _decode(engines: dict[str, Any], batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Turns of ``args.turn`` steps of requests that all columns answer at the same time, mean seconds of a step."""
    turns: dict[str, list[float]] = {column: [] for column in engines}
    for seed in _seeds(args):
        for engine in engines.values():
            _add(engine, batch, args.prompt, args.steps, seed)
            _steps(engine, EDGE_STEPS)
        for _ in range((args.steps - 2 * EDGE_STEPS) // args.turn):
            for column in _order(engines, len(turns["base"])):
                turns[column].append(statistics.fmean(_steps(engines[column], args.turn)[2:]))
        for engine in engines.values():
            _steps(engine, 10**6)
    return [_row("decode", batch, column, turns) for column in engines]


def _prefill(engines: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Turns of one prompt of ``args.prefill`` tokens."""
    turns: dict[str, list[float]] = {column: [] for column in engines}
    for seed in _seeds(args):
        for column in _order(engines, len(turns["base"])):
            _add(engines[column], 1, args.prefill, 1, seed)
            turns[column].append(sum(_steps(engines[column], 10**6)))
    return [_row("prefill", 1, column, {name: seconds[1:] for name, seconds in turns.items()}) for column in engines]


def _added(base: Any, engine: Any, args: argparse.Namespace) -> dict[str, float]:
    """Operations of torch that ``engine`` runs more often than ``base`` in a decode step, by torch's profiler."""
    counts = {name: _operations(each, args) for name, each in (("base", base), ("own", engine))}
    more = {name: count - counts["base"].get(name, 0.0) for name, count in counts["own"].items()}
    return {name: round(count, 2) for name, count in more.items() if count >= 0.01}


def _operations(engine: Any, args: argparse.Namespace) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    steps = 32
    _add(engine, args.batches[0], args.prompt, steps + 16, seed=-1)
    _steps(engine, 8)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        _steps(engine, steps)
    _steps(engine, 10**6)
    return {event.key: event.count / steps for event in profiler.key_averages()}


def _seeds(args: argparse.Namespace) -> Iterator[int]:
    """0, 1, ... for ``args.seconds``, three at least."""
    until = time.monotonic() + args.seconds
    for seed in itertools.count():
        if seed >= 3 and time.monotonic() > until:
            return
        yield seed


def _order(engines: dict[str, Any], turn: int) -> list[str]:
    columns = list(engines)
    return columns[turn % len(columns) :] + columns[: turn % len(columns)]


def _row(kind: str, batch: int, column: str, turns: dict[str, list[float]]) -> dict[str, Any]:
    ratios = sorted(own / base for own, base in zip(turns[column], turns["base"], strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    # The ranks between which the median of the population lies in 95 of 100 samples (binomial, normal approximation).
    reach = 0.98 * len(ratios) ** 0.5
    rank = max(0, round(len(ratios) / 2 - reach))
    return {
        "kind": kind,
        "batch": batch,
        "column": column,
        "median_ms": round(1e3 * statistics.median(turns[column]), 4),
        "over_base_pct": _percent(middle),
        "confidence_pct": [_percent(ratios[rank]), _percent(ratios[-1 - rank])],
        "iqr_pct": [_percent(low), _percent(high)],
        "turns": len(ratios),
    }


def _percent(ratio: float) -> float:
    return round(100 * (ratio - 1), 3)


def _report(rows: list[dict[str, Any]], out: str) -> list[dict[str, Any]]:
    for row in rows:
        print(json.dumps(row), flush=True)
        if out:
            with Path(out).open("a") as file:
                file.write(json.dumps(row) + "\n")
    return rows


def _result(rows: list[dict[str, Any]], columns: list[str]) -> dict[str, float]:
    names = {"base2": "noise_pct"} | {name: f"{name}_overhead_pct" for name in (*PRESETS, "eager")}
    return {
        names[column]: max((row["over_base_pct"] for row in rows if row["column"] == column), key=abs)
        for column in columns
        if column in names
    }


if __name__ == "__main__":
    main()
