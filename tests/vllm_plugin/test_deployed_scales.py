"""Static INT-8 scales of the served checkpoint: read from the loaded model, and judged by what is really clipped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import NATIVE, Run

from maxact_proto import stats

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

SCALE, TOO_SMALL = 0.5, 1e-4
SMALL = ("model.layers.0.self_attn.o_", "model.layers.1.mlp.gate_", "model.layers.1.mlp.up_")
CLIPPED = {(0, "o_proj_input"), (1, "mlp_input")}

QUANTIZE = f"""
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
source, target = map(Path, sys.argv[1:])
tensors = {{}}
for name, tensor in load_file(source / "model.safetensors").items():
    if not name.endswith("_proj.weight"):
        tensors[name] = tensor
        continue
    scale = tensor.float().abs().amax(-1, keepdim=True) / 127
    tensors[name] = (tensor.float() / scale).round().to(torch.int8)
    tensors[name + "_scale"] = scale
    small = name.startswith({SMALL!r})
    tensors[name.replace("weight", "input_scale")] = torch.tensor([{TOO_SMALL} if small else {SCALE}])
save_file(tensors, target / "model.safetensors")
"""


def int8(**more: object) -> dict[str, object]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False} | more


@pytest.fixture(scope="module")
def static_int8(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as compressed-tensors W8A8; two input scales are far too small."""
    folder = tmp_path_factory.mktemp("models") / "static-int8"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", QUANTIZE, tiny_llama, folder], check=True, capture_output=True)
    shutil.copy(tiny_llama / "config.json", folder)
    config = json.loads((folder / "config.json").read_text())
    group = {
        "targets": ["Linear"],
        "weights": int8(strategy="channel"),
        "input_activations": int8(strategy="tensor"),
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def served(engine_run: Callable[..., Run], static_int8: Path) -> Run:
    llm = {"model": str(static_int8), "max_model_len": 128, "skip_tokenizer_init": True}
    batches = [{"prompts": [list(range(3, 40))], "max_tokens": 4}]
    return engine_run({"llm": llm | NATIVE, "maxact": {"sites": "all"}, "batches": batches})


def test_the_limit_of_every_linear_input_is_its_scale_times_qmax(served: Run) -> None:
    for site in served.received.layouts["pp0tp0"].sites:
        if not site.name.endswith("_input"):
            assert site.limit is None, site
        else:
            scale = TOO_SMALL if (site.layer, site.name) in CLIPPED else SCALE
            assert site.limit == pytest.approx(127 * scale), site


def test_exactly_the_sites_with_too_small_a_scale_are_beyond_their_limit(served: Run) -> None:
    absmax = stats.absmax(served.received.total()).max(axis=0)
    sites = served.received.layouts["pp0tp0"].sites
    beyond = {
        (site.layer, site.name) for site, peak in zip(sites, absmax, strict=True) if peak > (site.limit or np.inf)
    }
    assert beyond == CLIPPED
