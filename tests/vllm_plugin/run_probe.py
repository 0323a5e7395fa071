"""Run as a program: what maxact left in a process after an in-process engine served; one JSON line.

``run_probe.py MODEL ADDITIONAL_CONFIG_JSON [CHANGE]``: ``CHANGE`` of `changes` is made first.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import torch
from changes import ACCIDENTS, CHANGES


def count_hooks(model: Any) -> int:
    """Forward hooks on all modules of a model."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def count_buffers(model: Any) -> int:
    """Buffers of ours on all modules of a model."""
    return sum("_maxact_" in name for name, _ in model.named_buffers())


def ours(owner: Any) -> list[str]:
    """Names of an object or a class that lead into maxact's code."""
    found = {name: getattr(value, "__func__", value) for name, value in vars(owner).items()}
    codes = {name: value.__code__ for name, value in found.items() if hasattr(value, "__code__")}
    return sorted(name for name, code in codes.items() if "/maxact_vllm/" in code.co_filename)


def main(model: str, additional: str, change: str = "") -> None:
    """Serve one request, then look around."""
    if change:
        (CHANGES | ACCIDENTS)[change].make()
    # On processors with AMX vLLM 0.32's attention uses it whether or not anything has asked Linux for it: an illegal
    # instruction where no product in bfloat16 came first.
    torch.cpu._init_amx()
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    llm = LLM(
        model,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=2,
        enforce_eager=True,
        additional_config=json.loads(additional),
    )
    sampling = SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False)
    [served] = llm.generate([TokensPrompt(prompt_token_ids=[1, 2, 3])], sampling, use_tqdm=False)
    engine = llm.llm_engine.engine_core.engine_core
    worker = engine.model_executor.driver_worker.worker
    found = {
        "served": len(served.outputs[0].token_ids),
        "hooks": count_hooks(worker.model_runner.model),
        "buffers": count_buffers(worker.model_runner.model),
        "threads": sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("maxact")),
        "modules": sorted(name for name in sys.modules if name.startswith("maxact")),
        "grpc": sorted(name for name in sys.modules if name.partition(".")[0] == "grpc"),
        "wrapped": sorted(ours(worker) + ours(worker.model_runner)),
        "patched": sorted(ours(EngineArgs) + ours(VllmConfig) + ours(WorkerWrapperBase)),
        "additional_config": llm.llm_engine.vllm_config.additional_config,
        "cache_key": getattr(llm.llm_engine.vllm_config, "compute_hash", str)(),
    }
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(*sys.argv[1:])
