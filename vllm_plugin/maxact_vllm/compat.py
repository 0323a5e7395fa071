"""Every touch of a private vLLM name, with the version range it was read in (0.26 to 0.32).

Nothing else in this package knows how vLLM's runners are built inside.
"""

from __future__ import annotations

import inspect
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one forward pass: requests in batch order, host arrays of shape ``[num_requests]``."""

    num_tokens: int
    """Token rows that count; the rows behind them are padding."""
    scheduled: npt.NDArray[np.int32]
    """Rows of each request."""
    computed: npt.NDArray[np.int32]
    """Tokens of each request computed before this step: the position of its first row."""
    prompt_lens: npt.NDArray[np.int32]


def canary() -> str:
    """Why this vLLM is not one we can observe; empty when all is as expected. Checks exactly what is patched."""
    try:
        from vllm.config import VllmConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.worker.worker_base import WorkerWrapperBase
    except ImportError as error:
        return f"vLLM moved what maxact patches: {error}"
    wanted = {
        EngineArgs: ("add_cli_args", "from_cli_args", "create_engine_config"),
        VllmConfig: ("compute_hash",),
        WorkerWrapperBase: ("init_device",),
    }
    for owner, names in wanted.items():
        for name in names:
            if name not in vars(owner):
                return f"vLLM's {owner.__name__}.{name} is gone"
    if "additional_config" not in inspect.signature(EngineArgs).parameters:
        return "vLLM's EngineArgs has no additional_config"
    return ""


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


def read_step(runner: Any, scheduler_output: Any) -> Step | None:
    """What the forward that `execute_model` just launched was made of; None when it ran no real token.

    V2 keeps its batch in ``execute_model_state.input_batch``; V1 in the persistent ``input_batch``. vLLM 0.26-0.32.
    """
    if not getattr(scheduler_output, "total_num_scheduled_tokens", 0):
        return None
    batch = runner.input_batch if hasattr(runner, "input_batch") else runner.execute_model_state.input_batch
    if hasattr(batch, "num_computed_tokens_np"):
        return Step(batch.num_tokens, batch.num_scheduled_tokens, batch.num_computed_tokens_np, batch.prefill_len_np)
    num = batch.num_reqs
    by_request = scheduler_output.num_scheduled_tokens
    scheduled = np.fromiter((by_request[name] for name in batch.req_ids[:num]), np.int32, num)
    return Step(
        scheduler_output.total_num_scheduled_tokens,
        scheduled,
        batch.num_computed_tokens_cpu[:num],
        batch.num_prompt_tokens[:num],
    )


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
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return any(isinstance(inner, AttentionLayerBase) for inner in module.modules())


def deployed_limit(linear: Any) -> float | None:
    """Largest magnitude that a linear layer's static input scale represents, scale x qmax; None where there is none.

    Per-tensor symmetric INT-8 and FP8, after vLLM has processed the weights. vLLM 0.26-0.32.
    """
    scale = getattr(linear, "input_scale", None)
    if scale is None or scale.numel() != 1 or getattr(linear, "input_zero_point", None) is not None:
        return None
    method = type(getattr(linear, "scheme", None) or linear.quant_method).__name__.lower()
    if "int8" in method:
        return float(scale) * 127
    if "fp8" in method:
        import torch
        from vllm.platforms import current_platform

        largest: float = torch.finfo(current_platform.fp8_dtype()).max
        return float(scale) * largest
    return None


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
