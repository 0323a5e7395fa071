"""Does closing windows hold the model's stream up, and is anything lost? Shown with events of that stream, no vLLM.

    python benchmarks/gpu_snapshot.py [--sites 182] [--steps 400] [--rounds 6] [--out F.jsonl]

A model's stream replays a CUDA graph of matrix products (a step of about 2 ms), then folds 64 rows of every site, as in
a decode step, all launched ahead of the GPU as under async scheduling. In every other round a flusher closes a window
each 5 ms on its side stream, two hundred times as often as by default. Events around every step give its time on the
GPU. Every folded element is 1, so the sums of all windows say whether one was lost or came twice.

Last line: ``RESULT {"undisturbed_ms": .., "closing_ms": .., "undisturbed_p99_ms": .., "closing_p99_ms": ..,
"windows": N, "lost": 0}``, medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maxact_proto import stats, wire
from maxact_vllm import ops
from maxact_vllm.buffers import allocate
from maxact_vllm.compat import Requests, Step
from maxact_vllm.flush import Flusher
from maxact_vllm.fold import Folder

ROWS = 64
DECODE = Step(ROWS, lambda: Requests(*(np.full(ROWS, each, np.int32) for each in (1, 10, 5))))
"""One row of each of as many requests, behind their prompts."""


class Model:
    """A stream that computes and folds."""

    def __init__(self, sites: int) -> None:
        ops.define("cuda")
        self.stream = torch.cuda.Stream()
        self.buffers = allocate([None] * sites, ROWS, torch.device("cuda"))
        self.folder = Folder(self.buffers)
        x = torch.randn(4096, 4096, device="cuda").bfloat16()
        self._work = [x, x.clone()]
        self._graph = torch.cuda.CUDAGraph()
        torch.mm(x, x)
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            for _ in range(10):
                torch.mm(x, x, out=self._work[1])
            self.buffers.block.fill_(1.0)

    def steps(self, count: int) -> list[float]:
        """Milliseconds of each step on the GPU."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        with torch.cuda.stream(self.stream):
            events[0].record()
            for event in events[1:]:
                self._graph.replay()
                self.folder.fold(DECODE)
                event.record()
        self.stream.synchronize()
        return [before.elapsed_time(after) for before, after in zip(events, events[1:], strict=False)]


def closing(model: Model, windows: list[wire.Window]) -> Flusher:
    """A flusher of the model's windows, running."""
    sites = tuple(
        wire.Site(layer=index, name="hidden", width=1, sharded=False) for index in range(model.buffers.block.shape[1])
    )
    layout = wire.Layout(model="m", engine="0", instance="i", sites=sites, interval_seconds=0.005)
    flusher = Flusher(model.folder.accumulators, model.buffers.histograms, layout, windows.append)
    flusher.start()
    return flusher


def main() -> None:
    """Take turns: rounds without and with windows being closed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=182)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    model = Model(args.sites)
    model.steps(20)
    closing(model, []).stop()  # takes what warming up left
    times: dict[str, list[list[float]]] = {"undisturbed": [], "closing": []}
    windows: list[wire.Window] = []
    for _ in range(args.rounds):
        times["undisturbed"].append(model.steps(args.steps))
        flusher = closing(model, windows)
        times["closing"].append(model.steps(args.steps))
        flusher.stop()
    folded = 2 * args.rounds * args.steps * ROWS
    summed = sum(window.values[stats.DECODE, :, stats.SUM_ABS].astype(np.float64) for window in windows)
    lost = float(np.abs(folded - summed).max())
    result: dict[str, Any] = {"windows": len(windows), "lost": lost}
    for name, rounds in times.items():
        result[f"{name}_ms"] = round(statistics.median(statistics.median(each) for each in rounds), 4)
        result[f"{name}_p99_ms"] = round(statistics.median(float(np.quantile(each, 0.99)) for each in rounds), 4)
    if args.out:
        Path(args.out).write_text(json.dumps({"device": torch.cuda.get_device_name(), **result}) + "\n")
    print("RESULT " + json.dumps(result), flush=True)
    if lost or sum(sum(window.tokens) for window in windows) != folded:
        raise SystemExit("statistics were lost or came twice")


if __name__ == "__main__":
    main()
