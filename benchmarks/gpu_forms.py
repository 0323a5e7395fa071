"""Where in a CUDA graph should statistics be taken? Decode steps of Qwen3-8B's shape without vLLM, several forms.

    python benchmarks/gpu_forms.py [--layers 36] [--batches 1,8,32,128,256] [--out F.jsonl]

One CUDA graph per form and batch, replayed in turns; the figure is the median over rounds of (own time / base time of
the same round). Forms: ``base`` none; ``base2`` none again (the noise); ``inline`` the kernel of `observe_gpu` once per
layer over its five sites, in line; ``inline5`` once per site, in line; ``join_qkv`` once per layer on a parallel branch
beside the next layer's first product, joined behind it; ``join_layer`` joined one layer later; ``join_end`` joined at
the graph's end; ``join_gate`` and ``join_down`` in two branches, the other one beside that product; ``join_each`` in
three, beside all of them.
Last line: ``RESULT {"<form>": {"<batch>": percent over base, ...}, ...}``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from maxact_proto import stats
from maxact_vllm import observe_gpu
from maxact_vllm.buffers import NUM_ROWS
from maxact_vllm.observe import packed

HIDDEN, QKV, INTERMEDIATE = 4096, 6144, 12288
AT_QKV = {"qkv": ("normed", "residual", "attention", "mlp_in", "product")}
FORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "base": {},
    "base2": {},
    "inline": AT_QKV,
    "inline5": AT_QKV,
    "join_qkv": AT_QKV,
    "join_layer": AT_QKV,
    "join_end": AT_QKV,
    "join_gate": {"gate_up": ("attention", "mlp_in", "residual"), "qkv": ("normed", "product")},
    "join_down": {"down": ("attention", "mlp_in", "product"), "qkv": ("normed", "residual")},
    "join_each": {"gate_up": ("attention", "mlp_in", "residual"), "down": ("product",), "qkv": ("normed",)},
}
"""Per form the sites of a layer that are read in front of a product."""


@torch.compile(dynamic=True)
def add_norm(x: Any, residual: Any) -> tuple[Any, Any]:
    total = x.float() + residual.float()
    return (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16(), total.bfloat16()


@torch.compile(dynamic=True)
def silu_mul(x: Any) -> Any:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


class Step:
    """One decode step in one form."""

    def __init__(self, form: str, layers: list[list[Any]], batch: int, counting: bool) -> None:
        self._form = form
        self._layers = layers
        self._x = torch.randn(batch, HIDDEN, device="cuda").bfloat16()
        self._rows = torch.zeros(len(layers), 5, NUM_ROWS, batch, device="cuda")
        self._histograms = torch.zeros(len(layers), 5, stats.NUM_BINS, dtype=torch.int64, device="cuda")
        self._scales = torch.zeros(5, 2, device="cuda")
        self._sampling = torch.tensor([packed(batch, 8 * batch, 0) if counting else 0], device="cuda")
        self._side = torch.cuda.Stream()
        self._kept: list[Any] = []

    def run(self) -> Any:
        main = torch.cuda.current_stream()
        x = residual = self._x
        made: dict[str, Any] = {}
        made["normed"], residual = add_norm(x, residual)
        for index, (qkv, o, gate_up, down) in enumerate(self._layers):
            made["residual"] = residual
            if index:
                self._take("qkv", index - 1, made, main)
            made["attention"] = torch.mm(made["normed"], qkv)[:, :HIDDEN].contiguous()
            self._join(main, "join_end", "join_layer")
            made["mlp_in"], residual = add_norm(torch.mm(made["attention"], o), residual)
            made["residual"] = residual
            self._take("gate_up", index, made, main)
            both = torch.mm(made["mlp_in"], gate_up)
            self._join(main, "join_end", "join_layer")
            made["product"] = silu_mul(both)
            self._take("down", index, made, main)
            x = torch.mm(made["product"], down)
            self._join(main, "join_end", "join_layer")
            made["normed"], residual = add_norm(x, residual)
        self._join(main)
        return made["normed"]

    def _take(self, product: str, index: int, made: dict[str, Any], main: Any) -> None:
        """Read the sites that this form reads in front of ``product``."""
        tensors = [made[site] for site in FORMS[self._form].get(product, ())]
        if not tensors:
            return
        if self._form == "inline5":
            for place, x in enumerate(tensors):
                self._observe(index, [x], [place])
        elif self._form == "inline":
            self._observe(index, tensors, list(range(len(tensors))))
        else:
            self._join(main, "join_end")
            self._side.wait_stream(main)
            with torch.cuda.stream(self._side):
                self._observe(index, tensors, list(range(len(tensors))))
            self._kept += tensors  # their memory may not be used again before the join

    def _join(self, main: Any, *later: str) -> None:
        """Wait for the branch, but in the forms of ``later``."""
        if self._kept and self._form not in later:
            main.wait_stream(self._side)
            self._kept.clear()

    def _observe(self, index: int, tensors: list[Any], sites: list[int]) -> None:
        buffers = (self._rows[index], self._histograms[index], self._sampling, self._scales)
        observe_gpu.observe(tensors, *buffers, sites)

    def capture(self) -> Any:
        warm = torch.cuda.Stream()
        with torch.cuda.stream(warm):
            self.run()
            self.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        return graph


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def main() -> None:
    """Capture all forms of a batch, replay them in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--batches", type=_sizes, default=[1, 8, 32, 128, 256])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--counting", action="store_true", help="a row of every step goes into the histogram")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.manual_seed(0)
    shapes = [(HIDDEN, QKV), (HIDDEN, HIDDEN), (HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN)]
    layers = [[torch.randn(*shape, device="cuda").bfloat16() * 0.01 for shape in shapes] for _ in range(args.layers)]
    result: dict[str, dict[str, float]] = {form: {} for form in FORMS}
    for batch in args.batches:
        steps = {form: Step(form, layers, batch, args.counting) for form in FORMS}
        graphs = {form: step.capture() for form, step in steps.items()}
        times = _replay(graphs, args.rounds)
        for form in FORMS:
            ratio = statistics.median(own / base for own, base in zip(times[form], times["base"], strict=True))
            result[form][str(batch)] = round(100 * (ratio - 1), 3)
            milliseconds = round(statistics.median(times[form]), 4)
            row = {"form": form, "batch": batch, "ms": milliseconds, "pct": result[form][str(batch)]}
            print(json.dumps(row), flush=True)
            if args.out:
                with Path(args.out).open("a") as file:
                    file.write(json.dumps(row) + "\n")
        del graphs, steps
    print("RESULT " + json.dumps(result), flush=True)


def _replay(graphs: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {form: [] for form in graphs}
    order = list(graphs)
    for turn in range(rounds + 3):
        for form in order[turn % len(order) :] + order[: turn % len(order)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graphs[form].replay()
            start.record()
            for _ in range(4):
                graphs[form].replay()
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:
                times[form].append(start.elapsed_time(end) / 4)
    return times


if __name__ == "__main__":
    main()
