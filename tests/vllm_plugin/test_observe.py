"""The operation on a group of sites: the kernels against the torch reference, and the build of the CPU's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import run_interpreted
from torch import nn

from maxact_proto import stats
from maxact_vllm import observe
from maxact_vllm.instrument import Tap, allocate, in_order, instrument
from maxact_vllm.observe import NUM_ROWS, reference


@pytest.mark.parametrize("dtype", observe.DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 576, 1537])
@pytest.mark.parametrize("num_tokens", [1, 33, 600])
def test_the_cpu_kernel_agrees_with_the_reference(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    observe.define("cpu")
    tensors = [torch.randn(num_tokens, width + 3).to(dtype)[:, :width] for _ in range(3)]
    rows = torch.full((4, NUM_ROWS, 640), -7.0)
    expected = rows.clone()
    torch.ops.maxact.observe(tensors, rows, [3, 0, 1])
    reference(tensors, expected, [3, 0, 1])
    assert torch.equal(rows[:, : stats.NUM_EXTREMA], expected[:, : stats.NUM_EXTREMA])
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [0, 18, 31])
def test_a_nan_shows_in_the_maximum_wherever_it_stands(place: int) -> None:
    observe.define("cpu")
    x = torch.randn(2, 32)
    x[1, place] = torch.nan
    rows = torch.zeros(1, NUM_ROWS, 64)
    torch.ops.maxact.observe([x], rows, [0])
    assert torch.isnan(rows[0, stats.MAX, 1])
    assert rows[0, stats.MAX, 0] == x[0].max()


@pytest.mark.timeout(300)
def test_the_gpu_kernel_agrees_with_the_reference_in_tritons_interpreter() -> None:
    run_interpreted("observe_interpreted.py")


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
    assert [tap.name for tap in taps] == ["o_proj_input", "down_proj_input", "attn_input", "attn_output"]
    block = allocate(len(taps), 5, torch.device("cpu"))
    instrument(taps, block)
    x = torch.randn(5, 8)
    with torch.inference_mode():
        for _ in range(2):  # the second forward starts from nothing
            model(x)
        seen = {tap.name: block[stats.MAX, index, :5] for index, tap in enumerate(taps)}
        assert torch.equal(seen["o_proj_input"], x.amax(-1))
        assert torch.equal(seen["attn_input"], model.down_proj(x).amax(-1))
        assert torch.equal(seen["attn_output"], (model.o_proj(x) + 1).amax(-1))
    assert torch.isneginf(block[:, :, 5:]).all()


def test_without_a_compiler_the_reference_observes_and_says_so(tmp_path: Path) -> None:
    script = (
        "import torch\nfrom maxact_vllm import observe\nobserve.define('cpu')\nrows = torch.zeros(1, 4, 64)\n"
        "torch.ops.maxact.observe([torch.ones(3, 5)], rows, [0])\nprint(rows[0, :, 2].tolist())"
    )
    environ = {**os.environ, "CXX": "/bin/false", "VLLM_CACHE_ROOT": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[1.0, 1.0, 5.0, 5.0]", done.stderr
    assert "the slow way: /bin/false failed" in done.stderr + done.stdout
