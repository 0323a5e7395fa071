"""Tiny random checkpoints, one per text-generation architecture: which there are, and how each is made small.

A `Recipe` names an architecture of vLLM's registry and the configuration that stands for it. Where transformers has a
class, the checkpoint is a real one with random weights, and what transformers computes from it is kept for comparison.
Where it has none, only a configuration is written, and vLLM fills the weights itself (``load_format="dummy"``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

PROMPT_LENGTH: Final = 12
PROMPTS: Final = [
    [(17 * row + 5 * place + place * place) % 250 + 3 for place in range(PROMPT_LENGTH)] for row in (1, 2, 3)
]
"""Token ids. All of one length, so that a position alone tells prompt rows from decoded ones."""

TINY: Final[Mapping[str, Any]] = {
    **{"vocab_size": 256, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1, "sliding_window": 16},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4},
    **{"num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64},
    **{"n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "num_dense_layers": 1},
    **{"shared_intermediate_size": 64, "prefix_dense_intermediate_size": 192, "expert_ffn_hidden_size": 64},
    **{"q_lora_rank": 64, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32},
    **{
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
    **{"state_size": 16, "mamba_d_state": 16, "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 32},
    **{"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_ssm": 256, "mamba_dt_rank": 8, "time_step_rank": 8},
    **{"chunk_size": 16, "mamba_chunk_size": 16, "num_nextn_predict_layers": 0},
    **{"n_layer": 4, "n_head": 4, "n_embd": 128, "ffn_dim": 192, "n_positions": 512, "word_embed_proj_dim": 128},
}
"""What makes a model small, by the name of the configuration field; each configuration takes those it knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One architecture and its tiny configuration."""

    family: str
    architecture: str
    """Name in vLLM's registry, or in transformers where vLLM runs it through its Transformers backend."""
    model_type: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Configuration fields beside `TINY`."""
    weights: bool = True
    """Whether transformers can make the weights."""
    variant: str = ""
    """Which of several models of one architecture this is."""
    saved: Mapping[str, Any] = field(default_factory=dict)
    """What vLLM reads in config.json and transformers does not write so; None: what it must not read."""
    dtype: str = "float32"
    """What it is served in: bfloat16 only where vLLM's CPU kernels take nothing else."""
    hidden: str = "sum"
    """The complete residual stream behind a layer that returns a pair: the ``sum`` of both, or the ``first``."""

    @property
    def name(self) -> str:
        """Its own among all recipes."""
        return f"{self.architecture}-{self.variant}" if self.variant else self.architecture


def _recipe(
    family: str,
    architecture: str,
    model_type: str,
    *,
    hidden: str = "sum",
    dtype: str = "float32",
    variant: str = "",
    **overrides: Any,
) -> Recipe:
    return Recipe(
        family=family,
        architecture=architecture,
        model_type=model_type,
        overrides=overrides,
        hidden=hidden,
        dtype=dtype,
        variant=variant,
    )


def _config_only(family: str, architecture: str, **overrides: Any) -> Recipe:
    """An architecture without a class in transformers: Llama's configuration with the fields that vLLM reads."""
    return Recipe(
        family=family, architecture=architecture, model_type="llama", overrides=_extra(overrides), weights=False
    )


def _extra(overrides: Mapping[str, Any]) -> dict[str, Any]:
    moe = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts", "n_group", "topk_group")
    bailing = {"use_bias": False, "use_qkv_bias": False, "norm_topk_prob": True, "embedding_dropout": 0.0}
    return bailing | {name: TINY[name] for name in (*moe, "first_k_dense_replace")} | dict(overrides)


_HYBRID: Final = ["linear_attention", "full_attention", "linear_attention", "full_attention"]

FIRST: Final = (
    _recipe("Llama", "LlamaForCausalLM", "llama"),
    _recipe("Mistral", "MistralForCausalLM", "mistral"),
    _recipe("Mixtral", "MixtralForCausalLM", "mixtral"),
    _recipe("Qwen2", "Qwen2ForCausalLM", "qwen2"),
    _recipe("Qwen3", "Qwen3ForCausalLM", "qwen3"),
    _recipe("Qwen3-MoE", "Qwen3MoeForCausalLM", "qwen3_moe"),
    _recipe("Qwen3.5", "Qwen3_5ForCausalLM", "qwen3_5_text", dtype="bfloat16", layer_types=_HYBRID),
    _recipe("Qwen3.5-MoE", "Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", dtype="bfloat16", layer_types=_HYBRID),
    _recipe("Gemma", "GemmaForCausalLM", "gemma"),
    _recipe("Gemma 2", "Gemma2ForCausalLM", "gemma2"),
    _recipe("Gemma 3", "Gemma3ForCausalLM", "gemma3_text"),
    _recipe("Gemma 4", "Gemma4ForCausalLM", "gemma4_text", hidden="first", num_experts=None),
    _recipe(
        "Gemma 4",
        "Gemma4ForCausalLM",
        "gemma4_text",
        hidden="first",
        variant="MoE",
        enable_moe_block=True,
        top_k_experts=2,
    ),
    _recipe("gpt-oss", "GptOssForCausalLM", "gpt_oss"),
    _recipe("DeepSeek V2", "DeepseekV2ForCausalLM", "deepseek_v2"),
    _recipe("DeepSeek V3", "DeepseekV3ForCausalLM", "deepseek_v3", topk_method="noaux_tc"),
    Recipe(
        family="DeepSeek V4",
        architecture="DeepseekV4ForCausalLM",
        model_type="deepseek_v4",
        weights=False,
        overrides={"head_dim": 512},
        saved={"compress_ratios": [1, 1, 4, 128], "mlp_layer_types": None, "num_hash_layers": 0},
    ),
    _recipe("GLM-4", "Glm4ForCausalLM", "glm4"),
    _recipe("GLM-4-MoE", "Glm4MoeForCausalLM", "glm4_moe", head_dim=32),
    _recipe("Kimi-Linear", "KimiLinearForCausalLM", "kimi_linear"),
    Recipe(family="MiMo", architecture="MiMoForCausalLM", model_type="qwen2"),
    _recipe(
        "MiMo-V2",
        "MiMoV2FlashForCausalLM",
        "mimo_v2_flash",
        hybrid_layer_pattern=[0, 1, 1, 0],
        moe_layer_freq=[0, 1, 1, 1],
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=32,
        swa_v_head_dim=32,
        layernorm_epsilon=1e-5,
        sliding_window_size=16,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
    ),
    _config_only("Bailing MoE (Ling)", "BailingMoeForCausalLM"),
    _config_only("Bailing MoE V2 (Ling 2)", "BailingMoeV2ForCausalLM"),
    _recipe("Laguna", "LagunaForCausalLM", "laguna"),
    _recipe("Laguna", "LagunaForCausalLM", "laguna", variant="dense", mlp_layer_types=["dense"] * 4),
    _recipe(
        "ZAYA",
        "ZayaForCausalLM",
        "zaya",
        hidden="first",
        num_experts_per_tok=1,
        router_hidden_size=64,
        num_attention_heads=2,
    ),
    _recipe("Cohere", "CohereForCausalLM", "cohere", hidden="first"),
    _recipe("Cohere2", "Cohere2ForCausalLM", "cohere2", hidden="first"),
    _recipe("Phi-3", "Phi3ForCausalLM", "phi3"),
    _recipe("OLMo-2", "Olmo2ForCausalLM", "olmo2"),
    _recipe("OLMoE", "OlmoeForCausalLM", "olmoe"),
    _recipe("Granite", "GraniteForCausalLM", "granite"),
    _recipe("Granite MoE", "GraniteMoeForCausalLM", "granitemoe"),
    _recipe(
        "Granite 4",
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        hidden="first",
        layer_types=["mamba", "attention"] * 2,
    ),
    _recipe("GPT-2", "GPT2LMHeadModel", "gpt2"),
    _recipe("OPT", "OPTForCausalLM", "opt"),
    _recipe("Mamba", "MambaForCausalLM", "mamba"),
    _recipe("Mamba-2", "Mamba2ForCausalLM", "mamba2", num_heads=8, head_dim=32, n_groups=1),
    _recipe("Falcon-H1", "FalconH1ForCausalLM", "falcon_h1"),
    _recipe(
        "Nemotron-H",
        "NemotronHForCausalLM",
        "nemotron_h",
        layers_block_type=["mamba", "mlp", "attention", "mlp"],
        n_groups=1,
    ),
)
"""The families that must be right."""


def recipes() -> list[Recipe]:
    """`FIRST`, then every other architecture of vLLM's registry that transformers can instantiate."""
    named = {recipe.architecture for recipe in FIRST}
    return [*FIRST, *(recipe for recipe in _rest() if recipe.architecture not in named)]


def _rest() -> Iterator[Recipe]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as BY_TYPE
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS as REGISTRY

    types = {name: kind for kind, names in BY_TYPE.items() for name in ([names] if isinstance(names, str) else names)}
    for architecture in REGISTRY:
        if architecture in types:
            family = architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
            overrides = _SPECIAL.get(architecture, {})
            yield _recipe(family, architecture, types[architecture], **overrides)


_SPECIAL: Final[Mapping[str, Mapping[str, Any]]] = {
    "Qwen3NextForCausalLM": {"dtype": "bfloat16", "layer_types": _HYBRID},
    "OlmoHybridForCausalLM": {"dtype": "bfloat16", "layer_types": _HYBRID},
    "Cohere2MoeForCausalLM": {"hidden": "first"},
    "Exaone4ForCausalLM": {"hidden": "first"},
    "HyperCLOVAXForCausalLM": {"hidden": "first"},
    "StableLmForCausalLM": {"hidden": "first"},
    "AfmoeForCausalLM": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "AXK1ForCausalLM": {"first_k_dense_replace": 0},
    "Glm4MoeLiteForCausalLM": {"first_k_dense_replace": 1},
    "HYV3ForCausalLM": {"first_k_dense_replace": 1, "expert_hidden_dim": 64, "route_norm": True, "qk_norm": True},
    "GPTJForCausalLM": {"rotary_dim": 32},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1},
    "MiniMaxM2ForCausalLM": {
        "rotary_dim": 32,
        "use_qk_norm": True,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    },
    "Llama4ForCausalLM": {"num_experts_per_tok": 1},
    "LongcatFlashForCausalLM": {
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "zero_expert_type": "identity",
        "zero_expert_num": 2,
    },
    "Lfm2ForCausalLM": {
        "conv_dim": 128,
        "conv_dim_out": 128,
        "block_dim": 128,
        "layer_types": ["conv", "full_attention"] * 2,
    },
}
"""Overrides of architectures beside `FIRST`."""


def make_config(recipe: Recipe) -> Any:
    """The tiny configuration of an architecture."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[recipe.model_type]
    known = {each.name for each in dataclasses.fields(kind)}
    tiny = {name: value for name, value in TINY.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention: one key per query head
        tiny["num_key_value_heads"] = tiny["num_attention_heads"]
    config = kind(**tiny | dict(recipe.overrides))
    config.architectures = [recipe.architecture]
    return config


def make_checkpoint(recipe: Recipe, folder: Path) -> None:
    """Write the checkpoint, and beside it what transformers computes from it (``transformers.json``)."""
    import torch
    from transformers import AutoModelForCausalLM

    config = make_config(recipe)
    if recipe.weights:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # No norm is left at one and no bias at zero: a step that is skipped must show.
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(folder)
        (folder / "transformers.json").write_text(json.dumps(_hidden_of(model, config.num_hidden_layers)))
    else:
        config.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved |= {"architectures": [recipe.architecture], **recipe.saved}
    saved = {name: value for name, value in saved.items() if name not in recipe.saved or value is not None}
    (folder / "config.json").write_text(json.dumps(saved, indent=1))


def _hidden_of(model: Any, num_layers: int) -> list[float] | str:
    """Absmax over the prompts of what each decoder layer returns in transformers; or why it cannot be said."""
    import torch

    layers = next((m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == num_layers), None)
    if layers is None:
        return "no list of decoder layers"
    peaks = [0.0] * num_layers

    def watch(index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            peaks[index] = max(peaks[index], float(hidden.abs().max()))

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_hook(watch(index))
    try:
        with torch.inference_mode():
            for ids in PROMPTS:
                model(torch.tensor([ids]), use_cache=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return peaks
