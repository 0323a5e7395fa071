"""Where in a CUDA graph should statistics be taken? Decode steps of Qwen3-8B's shape without vLLM, several forms.

    python benchmarks/gpu_forms.py [--layers 36] [--batches 1,8,32,128,256] [--out F.jsonl]

One CUDA graph per form and batch, replayed in turns; the figure is the median over rounds of (own time / base time of
the same round). Forms: ``base`` none; ``base2`` none again (the noise); ``inline`` one kernel per layer over its five
sites, in line; ``inline5`` one kernel per site, in line; ``join_gemm`` one kernel per layer on a parallel branch that
is joined behind the next matrix product; ``join_layer`` joined one layer later; ``join_end`` joined at the graph's
end.
Last line: ``RESULT {"<form>": {"<batch>": percent over base, ...}, ...}``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

HIDDEN, QKV, INTERMEDIATE = 4096, 6144, 12288
FORMS = ("base", "base2", "inline", "inline5", "join_gemm", "join_layer", "join_end")


@triton.jit
def _reduce(x, rows, stride_stat, token, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    bottom = tl.full([BLOCK], float("inf"), tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    magnitudes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        here = start + offsets < width
        value = tl.load(x + token * width + start + offsets, mask=here, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.where(here, value, float("-inf")))
        bottom = tl.minimum(bottom, tl.where(here, value, float("inf")))
        squares += value * value
        magnitudes += tl.abs(value)
    tl.store(rows, tl.max(top, axis=0))
    tl.store(rows + stride_stat, tl.min(bottom, axis=0))
    tl.store(rows + 2 * stride_stat, tl.sum(squares, axis=0))
    tl.store(rows + 3 * stride_stat, tl.sum(magnitudes, axis=0))


@triton.jit
def _observe5(a, b, c, d, e, rows, stride_stat, stride_site, width, wide, BLOCK: tl.constexpr):  # type: ignore
    token = tl.program_id(0)
    site = tl.program_id(1)
    own = rows + site * stride_site + token
    if site == 0:
        _reduce(a, own, stride_stat, token, width, BLOCK)
    elif site == 1:
        _reduce(b, own, stride_stat, token, width, BLOCK)
    elif site == 2:
        _reduce(c, own, stride_stat, token, width, BLOCK)
    elif site == 3:
        _reduce(d, own, stride_stat, token, width, BLOCK)
    else:
        _reduce(e, own, stride_stat, token, wide, BLOCK)


@triton.jit
def _observe1(a, rows, stride_stat, width, BLOCK: tl.constexpr):  # type: ignore
    token = tl.program_id(0)
    _reduce(a, rows + token, stride_stat, token, width, BLOCK)


def observe(tensors: list[Any], rows: Any) -> None:
    """All five sites of a layer in one launch; ``rows`` float32 ``[4, 5, tokens]``."""
    grid = (tensors[0].shape[0], len(tensors))
    _observe5[grid](*tensors, rows, rows.stride(0), rows.stride(1), HIDDEN, INTERMEDIATE, BLOCK=4096, num_warps=8)


def observe_each(tensors: list[Any], rows: Any) -> None:
    """The same in five launches."""
    for site, x in enumerate(tensors):
        _observe1[(x.shape[0],)](x, rows[:, site], rows.stride(0), x.shape[1], BLOCK=4096, num_warps=8)


@torch.compile(dynamic=False)
def add_norm(x: Any, residual: Any) -> tuple[Any, Any]:
    total = x.float() + residual.float()
    return (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16(), total.bfloat16()


@torch.compile(dynamic=False)
def silu_mul(x: Any) -> Any:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


class Step:
    """One decode step in one form."""

    def __init__(self, form: str, layers: list[list[Any]], batch: int) -> None:
        self._form = form
        self._layers = layers
        self._x = torch.randn(batch, HIDDEN, device="cuda").bfloat16()
        self._rows = torch.zeros(len(layers), 4, 5, batch, device="cuda")
        self._side = torch.cuda.Stream()
        self._kept: list[Any] = []

    def run(self) -> Any:
        main = torch.cuda.current_stream()
        x, residual, kept = self._x, self._x, None
        normed, residual = add_norm(x, residual)
        for index, (qkv, o, gate_up, down) in enumerate(self._layers):
            if kept is not None:
                self._take(index - 1, [normed, residual, *kept], main)
            attention = torch.mm(normed, qkv)[:, :HIDDEN].contiguous()
            if self._form == "join_gemm" and kept is not None:
                main.wait_stream(self._side)
                self._kept.clear()
            out = torch.mm(attention, o)
            mlp_in, residual = add_norm(out, residual)
            product = silu_mul(torch.mm(mlp_in, gate_up))
            x = torch.mm(product, down)
            normed, residual = add_norm(x, residual)
            kept = [attention, mlp_in, product]
        if self._form.startswith("join"):
            main.wait_stream(self._side)
            self._kept.clear()
        return normed

    def _take(self, index: int, tensors: list[Any], main: Any) -> None:
        if self._form.startswith("base"):
            return
        if self._form == "inline":
            observe(tensors, self._rows[index])
        elif self._form == "inline5":
            observe_each(tensors, self._rows[index])
        else:
            if self._form == "join_layer" and self._kept:
                main.wait_stream(self._side)
                self._kept.clear()
            self._side.wait_stream(main)
            with torch.cuda.stream(self._side):
                observe(tensors, self._rows[index])
            self._kept += tensors  # their memory may not be used again before the join

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
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.manual_seed(0)
    shapes = [(HIDDEN, QKV), (HIDDEN, HIDDEN), (HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN)]
    layers = [[torch.randn(*shape, device="cuda").bfloat16() * 0.01 for shape in shapes] for _ in range(args.layers)]
    result: dict[str, dict[str, float]] = {form: {} for form in FORMS}
    for batch in args.batches:
        steps = {form: Step(form, layers, batch) for form in FORMS}
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
