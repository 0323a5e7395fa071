"""One tiny checkpoint in one in-process vLLM engine, observed, and what was seen of it; once per process.

Mode ``native`` is vLLM's eager mode on the op bodies that torch.compile traces, with plain forward hooks beside
maxact's: they know modules by name, as the definition of each site says, and share no code with the plugin. Mode
``compiled`` is vLLM as it serves. A failure of vLLM is a result too (``error``).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
import types
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from architecture_models import PROMPT_LENGTH, PROMPTS, Recipe

DECODED: Final = 4
TOKENS: Final = [len(PROMPTS), len(PROMPTS) * (PROMPT_LENGTH - 1), len(PROMPTS) * (DECODED - 1)]
"""Token rows of the phases first, prefill and decode."""

_refused: list[Exception] = []
"""What importing a model class raised."""

_EMBEDDING: Final = ("embed_tokens", "wte", "word_embeddings", "embeddings", "embed_in", "embedding", "tok_embeddings")
_FINAL_NORM: Final = (
    "norm",
    "final_layernorm",
    "ln_f",
    "norm_f",
    "final_norm",
    "final_layer_norm",
    "embedding_norm",
    "norm_final",
)
_MIXERS: Final = (
    *("self_attn", "attention", "attn", "linear_attn", "self_attention", "mixer", "mamba", "conv", "short_conv"),
    "gated_delta_net",
)
_MLPS: Final = (*("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "ff", "shared_mlp", "shared_transformer"),)
_MIXER_INPUT: Final = (
    *("qkv_proj", "q_proj", "fused_qkv_a_proj", "qkv_a_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "qkv"),
    *("in_proj_qkvz", "in_proj_qkv", "in_proj", "q_a_proj", "qkvz_proj"),
)
_MIXER_OUTPUT: Final = ("o_proj", "out_proj", "dense", "c_proj", "wo", "linear_proj")
_MLP_INPUT: Final = (
    *("gate_up_proj", "up_proj", "fc1", "c_fc", "fc_in", "dense_h_to_4h", "w1", "w13", "gate_proj", "input_linear"),
    *("gate", "router"),
)
_MLP_OUTPUT: Final = (*("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2", "output_linear"),)
_MIXER_SITES: Final = (("attn_input", _MIXER_INPUT), ("o_proj_input", _MIXER_OUTPUT), "attn_output")
_MLP_SITES: Final = (("mlp_input", _MLP_INPUT), ("down_proj_input", _MLP_OUTPUT), "mlp_output")
_BARE_MLP: Final = (("mlp_input", "fc1"), ("down_proj_input", "fc2"))
_MERGED_GATE: Final = ("gate_up_proj", "w13", "input_linear")
_GATE: Final = (*_MERGED_GATE, "gate_proj")
_ROUTER: Final = ("gate", "router", "proj")
_OWN_NORM: Final = ("pre_feedforward_layernorm", "pre_mlp_layernorm", "post_feedforward_layernorm")
"""Where a layer has one of these, ``post_attention_layernorm`` belongs to the attention, not to the MLP."""
_ATTENTION_NORM: Final = ("post_self_attn_layernorm", "post_norm1")
_MLP_NORM: Final = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_norm2")


class RawHooks:
    """Collects each site's rows in eager mode: per token the largest and the smallest element."""

    def __init__(self, num_layers: int, hidden: str) -> None:
        self.rows: dict[str, list[Any]] = {}
        self.paths: dict[str, str] = {}
        self.modules: list[dict[str, str]] = []
        self._num_layers = num_layers
        self._hidden = hidden

    def install(self, model: Any) -> None:
        """Hook every module that has the name of a site's module."""
        modules = dict(model.named_modules())
        lists = [path for path, m in modules.items() if type(m).__name__ == "ModuleList" and len(m) == self._num_layers]
        layers = next((path for path in lists if re.search(r"(^|\.)(layers|h|blocks)$", path)), None)
        if layers is None:
            return
        around = layers.rpartition(".")[0]
        self.modules = [_types(modules[f"{layers}.{index}"]) for index in range(self._num_layers)]
        self._output("-.embedding", around, _EMBEDDING, modules)
        self._output("-.final_norm", around, _FINAL_NORM, modules)
        for index in range(self._num_layers):
            self._layer(index, f"{layers}.{index}", modules)
        # A compiled model's hooks are passed over, a layer may be given no positions: ask both.
        model.register_forward_pre_hook(self._positions, with_kwargs=True)
        modules[f"{layers}.0"].register_forward_pre_hook(self._positions, with_kwargs=True)

    def _layer(self, index: int, path: str, modules: dict[str, Any]) -> None:
        def complete(layer: Any, args: Any, output: Any) -> None:
            self._keep(f"{index}.hidden", _complete(output, self._hidden))

        modules[path].register_forward_hook(complete)
        self.paths[f"{index}.hidden"] = path
        mixer = _child(path, _MIXERS, modules)
        if _child(mixer, ("down_proj",), modules):  # one block per layer, and it is an MLP
            mlp, mixer = mixer, ""
        else:
            mlp = _child(path, _MLPS, modules)
        self._block(index, mixer, _MIXER_SITES, modules)
        self._block(index, mlp, _MLP_SITES, modules)
        self._cache(index, mixer, modules)
        self._gate(index, mlp, modules)
        self._experts(index, path, modules)
        own = ("post_attention_layernorm",) if _child(path, _OWN_NORM, modules) else ()
        for site, names in (("attn_post_norm", (*_ATTENTION_NORM, *own)), ("post_norm", _MLP_NORM)):
            if norm := _child(path, names, modules):
                self._hook_output(f"{index}.{site}", norm, modules)
        for site, name in _BARE_MLP if not mlp else ():
            self._input(f"{index}.{site}", path, (name,), modules)
        if not mlp and _child(path, ("fc2",), modules):
            self._hook_output(f"{index}.mlp_output", f"{path}.fc2", modules)

    def _block(self, index: int, path: str, sites: Any, modules: dict[str, Any]) -> None:
        if path:
            into, out_of, output = sites
            self._input(f"{index}.{into[0]}", path, into[1], modules)
            self._input(f"{index}.{out_of[0]}", path, out_of[1], modules)
            self._hook_output(f"{index}.{output}", path, modules)

    def _cache(self, index: int, mixer: str, modules: dict[str, Any]) -> None:
        """What attention is given as keys and values; of a latent attention the latent vector."""

        def watch(path: str, sites: Any) -> None:
            def keep(module: Any, args: Any, kwargs: Any) -> None:
                for place, site in enumerate(sites, 1):
                    x = (*args, *kwargs.values())[place]
                    self._keep(f"{index}.{site}", x.flatten(1))

            modules[path].register_forward_pre_hook(keep, with_kwargs=True)
            self.paths |= {f"{index}.{site}": path for site in sites}

        for path, module in modules.items():
            if mixer and path.startswith(f"{mixer}."):
                if type(module).__name__ == "MLAAttention":
                    watch(path, ("k",))
                elif getattr(module, "kv_sharing_target_layer_name", "") is None:
                    watch(path, ("k", "v"))

    def _gate(self, index: int, mlp: str, modules: dict[str, Any]) -> None:
        path = _descendant(mlp, _GATE, modules) if mlp else ""
        if not path:
            return
        self.paths[f"{index}.mlp_gate"] = path
        halves = 2 if path.rpartition(".")[2] in _MERGED_GATE else 1

        def keep(module: Any, args: Any, output: Any) -> None:
            self._keep(f"{index}.mlp_gate", _first(output).chunk(halves, dim=-1)[0])

        modules[path].register_forward_hook(keep)

    def _experts(self, index: int, layer: str, modules: dict[str, Any]) -> None:
        inside = [path for path in modules if path.startswith(f"{layer}.")]
        experts = next((path for path in inside if path.endswith(".experts")), "")
        if experts:
            self._watch_input(f"{index}.moe_input", experts, modules)
            linears = [path for path in inside if "Linear" in type(modules[path]).__name__ and "attn" not in path]
            named = [path for name in _ROUTER for path in linears if path.rpartition(".")[2] == name]
            if named:
                self._hook_output(f"{index}.router_logits", named[0], modules)

    def _input(self, site: str, block: str, names: Any, modules: dict[str, Any]) -> None:
        path = _descendant(block, names, modules)
        if path:
            self._watch_input(site, path, modules)

    def _watch_input(self, site: str, path: str, modules: dict[str, Any]) -> None:
        self.paths[site] = path
        modules[path].register_forward_pre_hook(
            lambda _, args, kwargs: self._keep(site, args[0] if args else next(iter(kwargs.values()))),
            with_kwargs=True,
        )

    def _output(self, site: str, parent: str, names: Any, modules: dict[str, Any]) -> None:
        path = _child(parent, names, modules) or _descendant(parent, names, modules)
        if path:
            self._hook_output(site, path, modules)

    def _hook_output(self, site: str, path: str, modules: dict[str, Any]) -> None:
        self.paths[site] = path

        def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            # Some mixers return nothing and fill an argument named so.
            self._keep(site, _first(kwargs.get("output", args[-1] if args else None) if output is None else output))

        modules[path].register_forward_hook(keep, with_kwargs=True)

    def _keep(self, site: str, x: Any) -> None:
        if x is not None:
            x = x.reshape(-1, x.shape[-1]).float()
            self.rows.setdefault(site, []).append(np.stack([x.amax(-1).numpy(), x.amin(-1).numpy()], axis=-1))

    def _positions(self, module: Any, args: Any, kwargs: Any) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        given |= given.get("kwargs", {})
        if "positions" in given:
            name = "layer_positions" if "hidden_states" in given else "positions"
            self.rows.setdefault(name, []).append(given["positions"].reshape(-1).numpy().copy())

    def by_phase(self) -> dict[str, Any]:
        """``site -> [[max, min] per phase]``; or a sentence where the rows are not those of the tokens."""
        rows = {name: np.concatenate(parts) for name, parts in self.rows.items()}
        of_layer = rows.pop("layer_positions", None)
        positions = rows.pop("positions", of_layer)
        masks = (positions == 0, (positions > 0) & (positions < PROMPT_LENGTH), positions >= PROMPT_LENGTH)
        return {name: _extrema(values, masks) for name, values in rows.items()}


def _types(layer: Any) -> dict[str, str]:
    return {path: type(module).__name__ for path, module in layer.named_modules() if path}


def _extrema(rows: Any, masks: Any) -> list[list[float]] | str:
    if len(rows) != len(masks[0]):
        return f"{len(rows)} rows for {len(masks[0])} tokens"
    return [[float(rows[mask, 0].max()), float(rows[mask, 1].min())] for mask in masks]


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _complete(output: Any, rule: str) -> Any:
    """The residual stream behind a layer, complete."""
    if not isinstance(output, tuple):
        return output
    if rule == "first" or len(output) < 2 or output[1] is None:
        return output[0]
    # As the native forms of vLLM's norms add: in float32.
    return (output[0].float() + output[1].float()).to(output[0].dtype)


def _child(parent: str, names: Any, modules: dict[str, Any]) -> str:
    return next((path for name in names if (path := f"{parent}.{name}".removeprefix(".")) in modules), "")


def _descendant(block: str, names: Any, modules: dict[str, Any]) -> str:
    # What a router is made of is no part of the MLP.
    inside = [path for path in modules if path.startswith(f"{block}.") and not re.search(r"\.(gate|router)\.", path)]
    return next((path for name in names for path in inside if path.rpartition(".")[2] == name), "")


def serve(recipe: Recipe, folder: Path, mode: str) -> dict[str, Any]:
    """Serve the prompts once; what was seen, or the ``error`` of vLLM."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        return _serve(recipe, folder, mode)
    except Exception as error:
        traceback.print_exc()
        return {"error": _said(error)}


def _serve(recipe: Recipe, folder: Path, mode: str) -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "vllm_plugin"))
    receiver = importlib.import_module("receiver")

    with receiver.Listening() as listening:
        llm = _engine(recipe, folder, mode, listening.endpoint)
        config = llm.llm_engine.vllm_config.model_config
        raw = RawHooks(config.hf_text_config.num_hidden_layers, recipe.hidden)
        if mode == "native":
            llm.apply_model(raw.install)
        _generate(llm)
        llm.llm_engine.engine_core.shutdown()
    seen = listening.receiver
    about = {"class": config.architecture, "dtype": str(config.dtype).removeprefix("torch.")}
    if not seen.layouts:
        return about | {"error": "maxact observes nothing of it"}
    sites = zip(seen.sites(), seen.layouts["pp0tp0"].sites, strict=True)
    return about | {
        "sites": [
            {
                **{"site": name, "path": site.module, "width": site.width},
                **{"extrema": seen.total()[:, index, :2].tolist(), "nonfinite": seen.total()[:, index, 4].tolist()},
            }
            for index, (name, site) in enumerate(sites)
        ],
        "tokens": seen.tokens(),
        "raw": raw.by_phase() if mode == "native" else {},
        "raw_paths": raw.paths,
        "layers": raw.modules,
    }


def _engine(recipe: Recipe, folder: Path, mode: str, endpoint: str) -> Any:
    from vllm import LLM

    _inspect_here()
    _stand_in_for_torchvision()
    if not recipe.weights:
        _wide_dummy_weights()
    native: dict[str, Any] = {"enforce_eager": True, "compilation_config": {"custom_ops": ["none"]}}
    # On processors with AMX vLLM prefers latent attention that takes no float32.
    plain: dict[str, Any] = {"attention_backend": "CPU_MLA"} if recipe.dtype == "float32" else {}
    return LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype=recipe.dtype,
        max_model_len=128,
        max_num_seqs=8,
        enable_prefix_caching=False,
        disable_log_stats=True,
        load_format="auto" if recipe.weights else "dummy",
        additional_config={"maxact": {"endpoint": endpoint, "interval": 0.2, "sites": "all"}},
        **(native if mode == "native" else {}),
        **plain,
    )


def _inspect_here() -> None:
    """vLLM looks at a model class in another process, which hides why one cannot be imported and costs seconds."""
    from vllm.model_executor.models import registry

    def here(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:
            _refused.append(error)
            raise

    registry._run_in_subprocess = here


def _stand_in_for_torchvision() -> None:
    """Text models that share a file with a vision model import torchvision, without a CPU build, and never use it."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.io"):
        module = types.ModuleType(name)
        module.__path__ = []
        module.__getattr__ = lambda attribute: unittest.mock.MagicMock(name=attribute)  # type: ignore[method-assign]
        sys.modules[name] = module


def _wide_dummy_weights() -> None:
    """vLLM's dummy weights lie within 0.001, which leaves nothing of a block's output: widen them."""
    from vllm.model_executor.model_loader import dummy_loader

    original: Callable[..., None] = dummy_loader.initialize_single_dummy_weight

    def wide(parameter: Any, *args: Any, **kwargs: Any) -> None:
        original(parameter, -0.3, 0.3)

    dummy_loader.initialize_single_dummy_weight = wide


def _generate(llm: Any) -> None:
    from vllm import SamplingParams, TokensPrompt

    # One token is allowed, so that all engines decode the same.
    sampling = SamplingParams(
        temperature=0, max_tokens=DECODED, ignore_eos=True, detokenize=False, allowed_token_ids=[7]
    )
    llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in PROMPTS], sampling, use_tqdm=False)


def _said(error: BaseException) -> str:
    """The innermost cause in one line."""
    error = _refused[0] if _refused else error
    while error.__cause__ is not None:
        error = error.__cause__
    if not str(error):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {frame.name} of {Path(frame.filename).name}: {frame.line}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
