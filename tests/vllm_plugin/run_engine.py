"""Run as a program: one in-process vLLM engine, observed, over given prompts; the raw tensors beside it if asked.

``run_engine.py SPEC.json OUT.npz``. SPEC: ``llm`` (arguments of `vllm.LLM`), ``batches`` (each a list of prompts as
token ids with ``max_tokens``, or ``embed``; and the folder of an ``adapter`` if asked), ``raw`` (also collect every
site's tensor with plain forward hooks, without maxact's code). OUT: ``<layer>.<site>`` -> float32 ``[rows, 2]`` (max,
min per token row) and ``positions`` int64 ``[rows]``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


class RawHooks:
    """Collects the tensors of every site of a Llama model in eager mode, by module name."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Any]] = {}

    def install(self, model: Any) -> None:
        """Hook each module where its site is defined."""
        llama = model.model
        self._output(llama.embed_tokens, "-.embedding", lambda out: out)
        self._output(llama.norm, "-.final_norm", lambda out: out[0])
        for index, layer in enumerate(llama.layers):
            self._input(layer.self_attn.qkv_proj, f"{index}.attn_input")
            self._cached(layer.self_attn.attn, index)
            self._input(layer.self_attn.o_proj, f"{index}.o_proj_input")
            self._output(layer.self_attn, f"{index}.attn_output", lambda out: out)
            self._input(layer.mlp.gate_up_proj, f"{index}.mlp_input")
            self._output(layer.mlp.gate_up_proj, f"{index}.mlp_gate", lambda out: out[0].chunk(2, dim=-1)[0])
            self._input(layer.mlp.down_proj, f"{index}.down_proj_input")
            self._output(layer.mlp, f"{index}.mlp_output", lambda out: out)
            # The residual add that vLLM fuses into the next norm, in the precision of its native form.
            self._output(layer, f"{index}.hidden", lambda out: (out[0].float() + out[1].float()).to(out[0].dtype))
        llama.layers[0].register_forward_pre_hook(self._positions)

    def _output(self, module: Any, name: str, pick: Any) -> None:
        module.register_forward_hook(lambda _, args, out: self._keep(name, pick(out)))

    def _input(self, module: Any, name: str) -> None:
        module.register_forward_pre_hook(lambda _, args: self._keep(name, args[0]))

    def _cached(self, attention: Any, index: int) -> None:
        def keep(_: Any, args: Any) -> None:
            for site, x in zip(("k", "v"), args[1:3], strict=True):
                self._keep(f"{index}.{site}", x.flatten(1))

        attention.register_forward_pre_hook(keep)

    def _keep(self, name: str, x: Any) -> None:
        rows = np.stack([x.max(dim=-1).values.float().numpy(), x.min(dim=-1).values.float().numpy()], axis=-1)
        self.rows.setdefault(name, []).append(rows)

    def _positions(self, layer: Any, args: Any) -> None:
        self.rows.setdefault("positions", []).append(args[0].numpy().copy())

    def save(self, path: str) -> None:
        """Write all rows of all steps."""
        np.savez(path, **{name: np.concatenate(rows) for name, rows in self.rows.items()})


class FormatHooks(RawHooks):
    """Collects the tensors themselves; writes what each number format costs them, without maxact's code.

    Per site ``[formats, 2]``: SQNR in dB and the share of elements that become zero, in the order of `dequantizers`, of
    all steps together.
    """

    def _keep(self, name: str, x: Any) -> None:
        self.rows.setdefault(name, []).append(x.float().numpy().copy())

    def save(self, path: str) -> None:
        """Quantize and dequantize every site at its own absmax, all steps together."""
        self.rows.pop("positions")
        formats = dequantizers()
        np.savez(path, **{name: _costs(np.concatenate(rows), formats) for name, rows in self.rows.items()})


def _costs(x: Any, formats: dict[str, Any]) -> Any:
    costs = []
    for dequantize in formats.values():
        near = dequantize(x.astype(np.float64))
        costs.append([10 * np.log10((x**2).mean() / ((x - near) ** 2).mean()), (near == 0).mean()])
    return np.array(costs)


def dequantizers() -> dict[str, Any]:
    """By format: from a tensor to what is left of it."""
    import torch

    def integer(qmax: int) -> Any:
        return lambda x: np.rint(x / (np.abs(x).max() / qmax)).clip(-qmax, qmax) * np.abs(x).max() / qmax

    def cast(x: Any, dtype: Any) -> Any:
        return torch.tensor(x, dtype=torch.float32).to(dtype).double().numpy()

    def float8(dtype: Any) -> Any:
        qmax = torch.finfo(dtype).max
        return lambda x: cast(x / np.abs(x).max() * qmax, dtype) * np.abs(x).max() / qmax

    def nvfp4(x: Any) -> Any:
        blocks = x.reshape(-1, 16)
        tensor_scale = np.abs(x).max() / (6 * 448)
        largest = np.abs(blocks).max(axis=1, keepdims=True)
        scale = cast(largest / 6 / tensor_scale, torch.float8_e4m3fn) * tensor_scale
        steps = np.abs(blocks) / np.where(scale > 0, scale, np.inf)
        represented = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        nearest = represented[np.searchsorted((represented[1:] + represented[:-1]) / 2, steps)]
        return (np.sign(blocks) * nearest * scale).reshape(x.shape)

    return {
        "int8": integer(127),
        "int4": integer(7),
        "fp8_e4m3": float8(torch.float8_e4m3fn),
        "fp8_e5m2": float8(torch.float8_e5m2),
        "nvfp4": nvfp4,
    }


class ScaledHooks(RawHooks):
    """Quantizes every tensor that has a static INT-8 scale; writes how many elements that saturates and zeroes."""

    def __init__(self, scales: dict[str, float]) -> None:
        super().__init__()
        self._scales = scales
        self.counts = {name: np.zeros(2, np.int64) for name in scales}

    def _keep(self, name: str, x: Any) -> None:
        if name in self._scales:
            steps = (x.float() / self._scales[name]).round()
            beyond = x.float().abs() > 127 * self._scales[name]
            self.counts[name] += np.array([beyond.sum(), (steps == 0).sum()])

    def save(self, path: str) -> None:
        """Write the counts of all steps."""
        np.savez(path, **self.counts)


def let_artefacts_load() -> None:
    """Let the CPU build load whole compiled models, as others do.

    It saves them, then fails to load them for want of one method on what was loaded, and compiles again.
    """
    import torch

    load = torch.compiler.load_compiled_function

    def load_complete(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda vllm_config: None
        return loaded

    torch.compiler.load_compiled_function = load_complete


def report_compilations() -> None:
    """Print vLLM's counts of what it compiled, saved and loaded, one line."""
    from vllm.compilation.counter import compilation_counter

    print("COMPILED " + json.dumps(dataclasses.asdict(compilation_counter)), flush=True)


def main(spec_path: str, out_path: str) -> None:
    """Serve the batches of a spec, one after another."""
    spec = json.loads(Path(spec_path).read_text())
    if spec.get("artefacts"):
        let_artefacts_load()
    if spec.get("formats"):
        from maxact_proto import stats
        from maxact_vllm import observe

        # What is compared is the arithmetic, not the draw.
        stats.SAMPLE_EVERY = observe.DECODE_STEPS = 1  # type: ignore[misc]
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    started = time.monotonic()
    llm = LLM(**spec["llm"])
    print(f"engine up in {time.monotonic() - started:.1f} s", flush=True)
    raw = FormatHooks() if spec.get("formats") else ScaledHooks(spec["scales"]) if "scales" in spec else RawHooks()
    if spec.get("raw") or spec.get("formats") or "scales" in spec:
        llm.apply_model(raw.install)
    time.sleep(spec.get("idle_seconds", 0))
    for batch in spec["batches"]:
        sampling = SamplingParams(temperature=0, max_tokens=batch.get("max_tokens"), ignore_eos=True, detokenize=False)
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in batch["prompts"]]
        adapter = LoRARequest("adapter", 1, batch["adapter"]) if "adapter" in batch else None
        if batch.get("embed"):
            llm.embed(prompts, use_tqdm=False)
        else:
            llm.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
        print("served a batch", flush=True)
        time.sleep(spec.get("pause_seconds", 0))
    time.sleep(spec.get("linger_seconds", 0))
    report_compilations()
    raw.save(out_path)


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(*sys.argv[1:])
