"""Static scales of the served checkpoint: read from the loaded model, and what they saturate and zero counted exactly.

Served for real: INT-8 with static scales, some far too small on purpose, beside INT-8 with dynamic ones. FP8 needs
instructions that not every CPU has (AMX for linear layers, AVX-512 for the KV cache): there vLLM's layers are stood in
for, as they are after loading.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import NATIVE, Run

from maxact_proto import stats
from maxact_vllm import compat

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

QMAX = 127
INPUTS = {
    "0.attn_input": (0.01, "model.layers.0.self_attn.[qkv]_proj"),
    "0.o_proj_input": (1e-4, "model.layers.0.self_attn.o_proj"),
    "0.mlp_input": (0.05, "model.layers.0.mlp.(gate|up)_proj"),
    "0.down_proj_input": (0.02, "model.layers.0.mlp.down_proj"),
}
DYNAMIC = "model.layers.1.*_proj"
STATIC = {name: scale for name, (scale, _) in INPUTS.items()}

QUANTIZE = """
import json, re, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
source, target = map(Path, sys.argv[1:3])
inputs = json.loads(sys.argv[3])
tensors = {}
for name, tensor in load_file(source / "model.safetensors").items():
    module = name.removesuffix(".weight")
    if not re.fullmatch("model.layers.*_proj", module):
        tensors[name] = tensor
        continue
    weight_scale = tensor.float().abs().amax(-1, keepdim=True) / 127
    tensors[name], tensors[name + "_scale"] = (tensor.float() / weight_scale).round().to(torch.int8), weight_scale
    for scale, pattern in inputs.values():
        if re.fullmatch(pattern, module):
            tensors[module + ".input_scale"] = torch.tensor([scale])
save_file(tensors, target / "model.safetensors")
"""


def int8(**more: object) -> dict[str, object]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False} | more


def group(patterns: list[str], **activations: object) -> dict[str, object]:
    return {
        "targets": [f"re:{pattern}" for pattern in patterns],
        "weights": int8(strategy="channel"),
        "input_activations": int8(**activations),
    }


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as compressed-tensors W8A8."""
    folder = tmp_path_factory.mktemp("models") / "quantized"
    folder.mkdir()
    arguments = [sys.executable, "-c", QUANTIZE, tiny_llama, folder, json.dumps(INPUTS)]
    subprocess.run(arguments, check=True, capture_output=True)
    shutil.copy(tiny_llama / "config.json", folder)
    config = json.loads((folder / "config.json").read_text())
    static = group([pattern for _, pattern in INPUTS.values()], strategy="tensor")
    dynamic = group([DYNAMIC], strategy="token", dynamic=True)
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": static, "group_1": dynamic},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def served(engine_run: Callable[..., Run], quantized: Path) -> Run:
    llm = {"model": str(quantized), "max_model_len": 128, "skip_tokenizer_init": True}
    batches = [{"prompts": [list(range(3, 40))], "max_tokens": 4}]
    return engine_run({"llm": llm | NATIVE, "maxact": {"sites": "all"}, "batches": batches, "scales": STATIC})


def sites(run: Run) -> dict[str, Any]:
    return dict(zip(run.received.sites(), run.received.layouts["pp0tp0"].sites, strict=True))


def test_the_limit_of_a_static_scale_is_scale_times_qmax_and_a_dynamic_one_has_none(served: Run) -> None:
    for name, site in sites(served).items():
        if name in STATIC:
            assert site.limit == pytest.approx(QMAX * STATIC[name]), name
        else:
            assert site.limit is None, name


def test_saturated_and_zeroed_elements_are_exactly_those_of_quantizing_the_same_tensors(served: Run) -> None:
    windows = [window.counts for window in served.received.windows["pp0tp0"] if window.counts is not None]
    counted = dict(zip(sites(served), np.sum(windows, axis=0).sum(axis=0), strict=True))
    for name, counts in counted.items():
        assert counts.tolist() == (served.raw[name].tolist() if name in STATIC else [0, 0]), name
    assert {name for name in STATIC if counted[name][stats.SATURATED]} == {"0.attn_input", "0.o_proj_input"}
    assert sum(counted[name][stats.ZEROED] > 0 for name in STATIC) > len(STATIC) / 2


@pytest.mark.parametrize(
    ("cache_dtype", "qmax", "smallest"),
    [("fp8", 448, 2**-9), ("fp8_e4m3", 448, 2**-9), ("fp8_e5m2", 57344, 2**-16), ("auto", None, None)],
)
def test_scales_of_the_kv_cache_are_read_from_the_attention_layer(
    cache_dtype: str, qmax: float | None, smallest: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    class StandsForAttention(AttentionLayerBase):  # type: ignore[misc, unused-ignore]
        """What vLLM's attention layer is after loading, on a machine that has FP8 caches."""

        kv_cache_dtype = cache_dtype
        num_kv_heads, head_size, head_size_v = 2, 8, 4
        _k_scale, _v_scale = torch.tensor(0.5), torch.tensor(0.25)

        def get_attn_backend(self) -> Any: ...
        def get_kv_cache_spec(self, vllm_config: Any) -> Any: ...

    monkeypatch.setattr(compat, "_tensor_parallel", lambda: (0, 1))
    k, v = compat.cached(StandsForAttention(), 1)
    assert (k.site, k.width, v.site, v.width) == ("k", 16, "v", 8)
    if qmax is None or smallest is None:
        assert k.scale is v.scale is None
    else:
        assert k.scale == compat.StaticScale(limit=0.5 * qmax, zero=0.5 * smallest / 2)
        assert v.scale == compat.StaticScale(limit=0.25 * qmax, zero=0.25 * smallest / 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of what vLLM imports
def test_a_static_fp8_scale_is_read_from_the_linear_layer() -> None:
    import torch
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8

    # A CUDA build's layer after loading; what its platform calls FP8 is what every platform but MI300 does.
    scheme = object.__new__(CompressedTensorsW8A8Fp8)
    layer = types.SimpleNamespace(scheme=scheme, input_scale=torch.tensor(0.5))
    assert compat.static_scale(layer) == compat.StaticScale(limit=0.5 * 448, zero=0.5 * 2**-10)
    layer.input_scale = None
    assert compat.static_scale(layer) is None, "a dynamic scale"
