"""Every touch of a private vLLM name, with the version range it was read in (0.26 to 0.32).

Nothing else in this package knows how vLLM's runners are built inside.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Requests(NamedTuple):
    """The requests of one forward pass in batch order: host arrays of shape ``[num_requests]``."""

    scheduled: npt.NDArray[np.int32]
    """Rows of each request."""
    computed: npt.NDArray[np.int32]
    """Tokens of each request computed before this step: the position of its first row."""
    prompt_lens: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one forward pass."""

    num_tokens: int
    """Token rows that count; the rows behind them are padding."""
    requests: Callable[[], Requests]
    """Look-ups per request and arrays, whose code a forward drives out of the caches: most decode steps do not ask."""
    cached: int = 0
    """Tokens of requests that start here whose keys and values were cached: they are never rows."""
    continues: bool = False
    """The requests of the step before, as many rows of each, and none that starts or starts again."""


def unsupported(vllm_config: Any) -> str:
    """Why this configuration cannot be observed; empty when it can. vLLM 0.26-0.32."""
    parallel = vllm_config.parallel_config
    if getattr(parallel, "use_ubatching", False):
        return "micro-batching (dual-batch overlap) runs one step as two forwards"
    if vllm_config.model_config.runner_type == "pooling":
        return "pooling models are not observed"
    return ""


def build_on_meta(model: str) -> tuple[Any, Any]:
    """The modules of a model without memory for its weights, and vLLM's configuration. vLLM 0.26-0.32.

    Raises what vLLM raises for a model it does not know.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    arguments = EngineArgs(model=model, load_format="dummy", skip_tokenizer_init=True, enforce_eager=True)
    config = arguments.create_engine_config()
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/group", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(config.model_config.dtype)
        with torch.device("meta"):
            return initialize_model(vllm_config=config), config


def inner_model(runner: Any) -> Any:
    """The bare model module, without graph wrappers. vLLM 0.26-0.32, both runners."""
    return runner.get_model()


def max_rows(vllm_config: Any) -> int:
    """Upper bound of the rows of one forward pass, padding included. vLLM 0.26-0.32."""
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
    rows = max(vllm_config.scheduler_config.max_num_batched_tokens, *sizes)
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    return int(-(-rows // tp_size) * tp_size)


def captures_pieces() -> bool:
    """Whether the forward under way is captured in pieces from attention to attention; True where vLLM does not say.
    vLLM 0.26-0.32."""
    try:
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import get_forward_context

        return bool(get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE)
    except (ImportError, AssertionError, AttributeError):
        return True


class StepReader:
    """Reads what the forwards of one runner are made of."""

    def __init__(self) -> None:
        self._scheduled: dict[str, int] = {}
        """Rows of each request of the step before."""

    def read(self, runner: Any, scheduler_output: Any) -> Step | None:
        """What the forward that `execute_model` just launched was made of; None when it ran no real token.

        V2 keeps its batch in ``execute_model_state.input_batch``; V1 in the persistent ``input_batch``. vLLM 0.26-0.32.
        """
        num_tokens = getattr(scheduler_output, "total_num_scheduled_tokens", 0)
        if not num_tokens:
            return None
        batch = runner.input_batch if hasattr(runner, "input_batch") else runner.execute_model_state.input_batch
        by_request = scheduler_output.num_scheduled_tokens
        starting = scheduler_output.scheduled_new_reqs or scheduler_output.scheduled_cached_reqs.resumed_req_ids
        continues = not starting and by_request == self._scheduled
        self._scheduled = by_request
        if hasattr(batch, "num_computed_tokens_np"):
            num_tokens = batch.num_tokens

            def requests() -> Requests:
                return Requests(batch.num_scheduled_tokens, batch.num_computed_tokens_np, batch.prefill_len_np)

        else:

            def requests() -> Requests:
                num = batch.num_reqs
                scheduled = np.fromiter((by_request[name] for name in batch.req_ids[:num]), np.int32, num)
                return Requests(scheduled, batch.num_computed_tokens_cpu[:num], batch.num_prompt_tokens[:num])

        return Step(num_tokens, requests, _cached_tokens(scheduler_output) if starting else 0, continues)


def _cached_tokens(scheduler_output: Any) -> int:
    """Tokens that requests which start, or start again after a preemption, found in the KV cache. vLLM 0.26-0.32."""
    running = scheduler_output.scheduled_cached_reqs
    counts = zip(running.req_ids, running.num_computed_tokens, strict=True)
    cached = sum(count for name, count in counts if name in running.resumed_req_ids)
    return int(cached + sum(request.num_computed_tokens for request in scheduler_output.scheduled_new_reqs))


def identity(vllm_config: Any) -> dict[str, Any]:
    """Who this worker is: the fields of `maxact_proto.wire.Layout` that vLLM knows. vLLM 0.26-0.32."""
    from vllm import __version__ as vllm_version
    from vllm.distributed import parallel_state

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    served = model.served_model_name or model.model
    tp_group, pp_group = parallel_state.get_tp_group(), parallel_state.get_pp_group()
    return {
        "model": served if isinstance(served, str) else served[0],
        "model_type": str(getattr(model.hf_text_config, "model_type", "")),
        "dtype": str(model.dtype).removeprefix("torch."),
        "engine": str(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank)),
        "instance": vllm_config.instance_id or "unnamed",
        "tp_rank": tp_group.rank_in_group,
        "tp_size": tp_group.world_size,
        "pp_rank": pp_group.rank_in_group,
        "pp_size": pp_group.world_size,
        "vllm_version": vllm_version,
    }


def holds_attention(module: Any) -> bool:
    """Whether an attention-like layer (attention, Mamba, linear attention) is inside. vLLM 0.26-0.32."""
    return any(is_mixer(inner) for inner in module.modules())


def is_mixer(module: Any) -> bool:
    """Whether this is an attention-like layer itself. vLLM 0.26-0.32."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return isinstance(module, AttentionLayerBase)


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticScale:
    """What a per-tensor symmetric scale of the served checkpoint leaves of a tensor."""

    limit: float
    """Largest magnitude it represents: scale x qmax."""
    zero: float
    """Largest magnitude that rounds to zero: half of the smallest one it represents, ties going to even."""


def static_scale(linear: Any) -> StaticScale | None:
    """A linear layer's static input scale, INT-8 or FP8; None where there is none. vLLM 0.26-0.32.

    Read after vLLM has processed the weights.
    """
    scale = _number(getattr(linear, "input_scale", None))
    if scale is None or getattr(linear, "input_zero_point", None) is not None:
        return None
    method = type(getattr(linear, "scheme", None) or linear.quant_method).__name__.lower()
    if "int8" in method:
        return StaticScale(limit=scale * 127, zero=scale / 2)
    if "fp8" in method:
        from vllm.platforms import current_platform

        return _fp8_scale(scale, current_platform.fp8_dtype())
    return None


def _number(scale: Any) -> float | None:
    """The one scale of a tensor; None where there are several, or no weights were loaded."""
    return None if scale is None or scale.numel() != 1 or scale.is_meta else float(scale)


def _fp8_scale(scale: float, dtype: Any) -> StaticScale:
    import torch

    format = torch.finfo(dtype)
    return StaticScale(limit=scale * format.max, zero=scale * format.smallest_normal * format.eps / 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cached:
    """One of the tensors that an attention layer puts into the KV cache."""

    site: str
    width: int
    sharded: bool
    scale: StaticScale | None


def cache_replicas(block: Any) -> int:
    """How many tensor-parallel ranks hold each head of keys and values. vLLM 0.26-0.32."""
    return max((getattr(inner, "num_kv_head_replicas", 1) for inner in block.modules()), default=1)


def cached(module: Any, replicas: int) -> list[Cached]:
    """What an attention layer caches: ``k`` and ``v``, or of a latent attention its one vector as ``k``.

    vLLM 0.26-0.32. Nothing for other modules, where the cache of an earlier layer is used, and on a rank whose heads a
    rank before it holds too; ``replicas``: of `cache_replicas`.
    """
    if not is_mixer(module) or not hasattr(module, "_k_scale"):
        return []
    if getattr(module, "kv_sharing_target_layer_name", None) is not None:
        return []
    if hasattr(module, "kv_lora_rank"):
        return [Cached(site="k", width=module.kv_lora_rank, sharded=False, scale=_cache_scale(module, "_k_scale"))]
    # As many ranks in a row hold the same heads: the first of them speaks for all.
    rank, size = _tensor_parallel()
    if rank % replicas:
        return []
    heads, sharded = module.num_kv_heads, size > replicas
    widths = {"k": heads * module.head_size, "v": heads * getattr(module, "head_size_v", module.head_size)}
    return [
        Cached(site=site, width=width, sharded=sharded, scale=_cache_scale(module, f"_{site}_scale"))
        for site, width in widths.items()
    ]


def _cache_scale(attention: Any, name: str) -> StaticScale | None:
    import torch
    from vllm.platforms import current_platform

    format, scale = attention.kv_cache_dtype, _number(getattr(attention, name))
    if format not in ("fp8", "fp8_e4m3", "fp8_e5m2") or scale is None:
        return None
    return _fp8_scale(scale, torch.float8_e5m2 if format == "fp8_e5m2" else current_platform.fp8_dtype())


def _tensor_parallel() -> tuple[int, int]:
    """This rank among those that share each layer, and how many they are."""
    from vllm.distributed import parallel_state

    group = parallel_state.get_tp_group()
    return group.rank_in_group, group.world_size


def is_missing_layer(module: Any) -> bool:
    """Whether this stands for a layer of another pipeline stage. vLLM 0.26-0.32."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return isinstance(module, PPMissingLayer)


def cache_root() -> Path:
    """Where vLLM keeps compiled artefacts. vLLM 0.26-0.32."""
    from vllm import envs

    return Path(envs.VLLM_CACHE_ROOT)


def count_memory(runner: Any, num_bytes: int) -> None:
    """Tell vLLM's memory profiling of what we allocated after the weights were loaded. vLLM 0.26-0.32."""
    if hasattr(runner, "model_memory_usage"):
        runner.model_memory_usage += num_bytes
