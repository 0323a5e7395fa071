"""The operation on a group of sites: the kernels against the torch reference, and the build of the CPU's."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import run_interpreted
from torch import library, nn

from maxact_proto import stats
from maxact_vllm import instrument as instrument_module
from maxact_vllm import observe, ops
from maxact_vllm.buffers import COUNTED_ROWS, NUM_ROWS, allocate
from maxact_vllm.instrument import Tap, in_order, instrument
from maxact_vllm.observe import packed, reference, sampled

UNSCALED = torch.tensor([[torch.inf, -1.0]]).expand(4, 2).contiguous()


@pytest.mark.parametrize("num_rows", [NUM_ROWS, COUNTED_ROWS])
@pytest.mark.parametrize("dtype", observe.DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 576, 1537])
@pytest.mark.parametrize("num_tokens", [1, 33, 600])
def test_the_cpu_kernel_agrees_with_the_reference(
    num_tokens: int, width: int, dtype: torch.dtype, num_rows: int
) -> None:
    ops.define("cpu")
    tensors = [torch.randn(num_tokens, width + 3).to(dtype)[:, :width] for _ in range(3)]
    tensors[2][num_tokens // 2, 0] = torch.nan
    written = torch.full((640, 4, num_rows), -7.0)
    rows = written.permute(1, 2, 0)
    scales = torch.tensor([[1.5, 0.25], [2.0, 0.5], [1.0, 1.0], [torch.inf, -1.0]])
    histograms = torch.zeros(4, stats.NUM_BINS, dtype=torch.int64)
    expected, counted = rows.clone(), histograms.clone()
    sampling = torch.tensor([packed(num_tokens, 64, min(5, num_tokens - 1))])
    torch.ops.maxact.observe(tensors, written, histograms, sampling, scales, [3, 0, 1])
    reference(tensors, expected, counted, sampling, scales, [3, 0, 1])
    assert torch.equal(histograms, counted)
    assert torch.isnan(rows[1, stats.MAX, num_tokens // 2])
    rows[1, :, num_tokens // 2] = expected[1, :, num_tokens // 2] = 0
    assert torch.equal(rows[:, : stats.NUM_EXTREMA], expected[:, : stats.NUM_EXTREMA])
    assert torch.equal(rows[:, NUM_ROWS:], expected[:, NUM_ROWS:])
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


def test_an_element_is_counted_in_the_bin_it_lies_in() -> None:
    ops.define("cpu")
    edges = torch.tensor(stats.BIN_EDGES, dtype=torch.float32)
    x = torch.cat([edges, -edges * 1.3, torch.tensor([0.0, 1e-30, 3e38])])[None]
    histograms = torch.zeros(1, stats.NUM_BINS, dtype=torch.int64)
    torch.ops.maxact.observe(
        [x], torch.zeros(64, 1, NUM_ROWS), histograms, torch.tensor([packed(1, 1, 0)]), UNSCALED, [0]
    )
    expected = torch.full((stats.NUM_BINS,), 2)
    expected[0] += 2
    expected[-1] += 1
    assert torch.equal(histograms[0], expected)


@pytest.mark.parametrize(
    ("num_tokens", "num_requests", "every"),
    [(1, 1, 64), (5, 1, 64), (5, 5, 64), (64, 64, 512), (100, 3, 64), (256, 256, 2048), (2000, 200, 500)],
)
def test_every_row_of_a_step_has_the_same_chance_and_its_weight_makes_up_for_it(
    num_tokens: int, num_requests: int, every: int
) -> None:
    counts = torch.zeros(num_tokens)
    for offset in range(every):
        histograms = torch.zeros(1, stats.NUM_BINS, dtype=torch.int64)
        chosen = sampled(num_tokens, num_requests, Draws(offset))
        x = torch.full((num_tokens, 1), 2.0 ** (stats.LOWEST_OCTAVE + 2))
        reference([x], torch.zeros(1, NUM_ROWS, num_tokens), histograms, torch.tensor([chosen]), UNSCALED, [0])
        counts[offset::every] += every
        assert histograms.sum() == every * len(counts[offset::every])
        assert len(counts[offset::every]) <= 4
    assert (counts == every).all()


class Draws(random.Random):
    """Draws what it was given."""

    def __init__(self, draw: int) -> None:
        super().__init__()
        self._draw = draw

    def randrange(self, start: int, *_: int) -> int:  # type: ignore[override]
        """The given draw, of ``start`` possible ones."""
        assert self._draw < start
        return self._draw


@pytest.mark.parametrize("dtype", observe.DTYPES)
@pytest.mark.parametrize("width", [1, 2, 31, 33, 64, 97, 200])
def test_extrema_are_exact_whatever_the_signs(width: int, dtype: torch.dtype) -> None:
    ops.define("cpu")
    x = torch.randn(8, width) * 2.0 ** torch.randint(-20, 10, (8, width))
    x[1], x[2] = x[1].abs() + 1e-3, -x[2].abs() - 1e-3
    x[3], x[4] = 0.0, -0.0
    x[5] = x[5].relu()
    x[6, -1], x[7, -1] = torch.inf, -torch.inf
    x = x.to(dtype)
    rows = torch.zeros(64, 1, NUM_ROWS)
    histograms = torch.zeros(1, stats.NUM_BINS, dtype=torch.int64)
    torch.ops.maxact.observe([x], rows, histograms, torch.tensor([0]), UNSCALED, [0])
    assert torch.equal(rows[:8, 0, stats.MAX], x.float().amax(-1))
    assert torch.equal(rows[:8, 0, stats.MIN], x.float().amin(-1))


@pytest.mark.parametrize("dtype", observe.DTYPES)
@pytest.mark.parametrize("place", [0, 18, 31])
def test_a_nan_shows_in_the_maximum_wherever_it_stands(place: int, dtype: torch.dtype) -> None:
    ops.define("cpu")
    x = torch.randn(2, 32).to(dtype)
    x[1, place] = torch.nan
    rows = torch.zeros(64, 1, NUM_ROWS)
    histograms = torch.zeros(1, stats.NUM_BINS, dtype=torch.int64)
    torch.ops.maxact.observe([x], rows, histograms, torch.tensor([0]), UNSCALED, [0])
    assert not histograms.any(), "no row was to be counted"
    assert torch.isnan(rows[1, 0, stats.MAX])
    assert rows[0, 0, stats.MAX] == x[0].max()


@pytest.mark.timeout(300)
def test_the_gpu_kernel_agrees_with_the_reference_in_tritons_interpreter() -> None:
    output = run_interpreted("observe_interpreted.py")
    assert "maxact cannot observe on this GPU; serving goes on" in output
    assert "what cannot be launched is survived" in output


class Layers(nn.Module):
    """Two decoder layers that write over a block's output, as fused norms do."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj, self.down_proj, self.qkv_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.attention, self.norm = nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.attention(self.o_proj(x) + 1)
        out.mul_(0)
        return self.qkv_proj(self.norm(self.down_proj(x)))


def test_a_group_is_read_at_its_last_site_and_an_output_before_a_norm_writes_over_it() -> None:
    model = Layers()
    sites = {"o_proj_input": model.o_proj, "down_proj_input": model.down_proj, "attn_input": model.qkv_proj}
    taps = [
        Tap(layer=int(name == "attn_input"), name=name, path="", module=module, reads="input", width=8)
        for name, module in sites.items()
    ]
    taps.append(Tap(layer=0, name="attn_output", path="", module=model.attention, reads="output", width=8))
    taps = in_order(taps[::-1])
    assert [tap.name for tap in taps] == ["o_proj_input", "attn_output", "down_proj_input", "attn_input"]
    buffers = allocate([None] * len(taps), 5, torch.device("cpu"))
    instrument(taps, buffers, branch=False)
    block = buffers.block
    x = torch.randn(5, 8)
    with torch.inference_mode():
        for _ in range(2):  # the second forward starts from nothing
            model(x)
        seen = {tap.name: block[stats.MAX, index, :5] for index, tap in enumerate(taps)}
        assert torch.equal(seen["o_proj_input"], x.amax(-1))
        assert torch.equal(seen["attn_input"], model.down_proj(x).amax(-1))
        assert torch.equal(seen["attn_output"], (model.o_proj(x) + 1).amax(-1))
    assert torch.isneginf(block[:, :, 5:]).all()


class AddNorm(nn.Module):
    """Returns what is normed and the residual stream, as vLLM's norms do."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x + residual
        return residual / residual.abs().amax(), residual


class Decoder(nn.Module):
    """Layers that write over what they no longer need, between the projections of the input and of the output too."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        names = ("qkv", "attention", "o", "up", "down")
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {name: nn.Linear(32, 32, bias=False) for name in names} | {"norm": AddNorm(), "post": AddNorm()}
            )
            for _ in range(layers)
        )
        self.final = AddNorm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = torch.zeros_like(x)
        for layer in self.layers:
            normed, residual = layer["norm"](x, residual)
            attended = layer["attention"](layer["qkv"](normed))
            out = layer["o"](attended)
            residual.mul_(0.5)
            normed, residual = layer["post"](out, residual)
            x = layer["down"](layer["up"](normed).relu())
            residual.add_(1)
        normed, residual = self.final(x, residual)
        return normed.mul_(residual.add_(1))


# The residual stream behind a layer is what the next one's norm returns.
_READS = {"hidden": ("norm", "residual"), "attn_input": ("qkv", "input"), "o_proj_input": ("o", "input")}
_READS |= {"mlp_input": ("up", "input"), "down_proj_input": ("down", "input"), "mlp_output": ("down", "output")}


@pytest.fixture(scope="module")
def branches() -> Iterator[list[tuple[Any, ...]]]:
    """Arguments of the branches under way. A CPU has no streams: a fake reads as late as a branch may run, at the
    join."""
    ops.define("cpu")
    under_way: list[tuple[Any, ...]] = []
    fake = library.Library("maxact", "FRAGMENT")
    fake.impl("fork", lambda *arguments: None, "CPU")
    fake.impl("branch", lambda *arguments: under_way.append(arguments[:-1]), "CPU")
    fake.impl("join", lambda tensors, rows: observe_what_is_kept(under_way.pop(), tensors), "CPU")
    yield under_way
    fake._destroy()


def observe_what_is_kept(arguments: tuple[Any, ...], kept: list[torch.Tensor]) -> None:
    """At a join. What the branch reads and the join does not, may be written over in between."""
    assert {x.data_ptr() for x in arguments[0]} <= {x.data_ptr() for x in kept}
    torch.ops.maxact.observe(*arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Inductor imports
@pytest.mark.parametrize("branch", [False, True])
def test_compiled_what_waits_is_read_as_it_was(
    branch: bool, branches: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Decoder(5)
    taps = in_order(
        [
            Tap(layer=index - (name == "hidden"), name=name, path="", module=layer[module], reads=reads, width=32)  # type: ignore[arg-type]
            for index, layer in enumerate(model.layers)
            for name, (module, reads) in _READS.items()
            if index or name != "hidden"
        ]
        + [
            Tap(layer=4, name="hidden", path="", module=model.final, reads="residual", width=32),
            Tap(layer=None, name="final_norm", path="", module=model.final, reads="output", width=32),
        ]
    )
    assert [tap.name for tap in taps[-3:]] == ["mlp_output", "hidden", "final_norm"]
    buffers = allocate([None] * len(taps), 64, torch.device("cpu"))
    monkeypatch.setattr(instrument_module, "_HELD_ELEMENTS", 64 * 32 * 13)
    instrument(taps, buffers, branch=branch)
    x = torch.randn(40, 32)
    with torch.inference_mode():
        model(x.clone())  # eager: every group at its end
        eager = buffers.block[:, :, :40].clone()
        buffers.block.fill_(-torch.inf)
        torch.compile(model, fullgraph=True)(x.clone())
    assert not branches
    assert eager.isfinite().all()
    torch.testing.assert_close(buffers.block[:, :, :40], eager, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_the_reference_observes_and_says_so(tmp_path: Path) -> None:
    script = (
        "import torch\nfrom maxact_vllm import ops\nops.define('cpu')\nrows = torch.zeros(64, 1, 4)\n"
        "counts = torch.zeros(1, 64, dtype=torch.int64)\n"
        "torch.ops.maxact.observe([torch.ones(3, 5)], rows, counts, torch.tensor([0]), torch.ones(1, 2), [0])\n"
        "print(rows[2, 0].tolist())"
    )
    environ = {**os.environ, "CXX": "/bin/false", "VLLM_CACHE_ROOT": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[1.0, 1.0, 5.0, 5.0]", done.stderr
    assert "the slow way: /bin/false failed" in done.stderr + done.stdout
