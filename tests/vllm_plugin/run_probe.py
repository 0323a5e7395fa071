"""Run as a program: what maxact left in a process after an in-process engine served; one JSON line.

``run_probe.py MODEL ADDITIONAL_CONFIG_JSON``
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any


def count_hooks(model: Any) -> int:
    """Forward hooks on all modules of a model."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def count_buffers(model: Any) -> int:
    """Buffers of ours on all modules of a model."""
    return sum("_maxact_" in name for name, _ in model.named_buffers())


def main(model: str, additional: str) -> None:
    """Serve one request, then look around."""
    from vllm import LLM, SamplingParams, TokensPrompt
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
    llm.generate([TokensPrompt(prompt_token_ids=[1, 2, 3])], sampling, use_tqdm=False)
    engine = llm.llm_engine.engine_core.engine_core
    worker = engine.model_executor.driver_worker.worker
    found = {
        "hooks": llm.apply_model(count_hooks)[0],
        "buffers": llm.apply_model(count_buffers)[0],
        "threads": sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("maxact")),
        "modules": sorted(name for name in sys.modules if name.startswith("maxact")),
        "grpc": sorted(name for name in sys.modules if name.partition(".")[0] == "grpc"),
        "wrapped": sorted({"load_model", "execute_model"} & set(vars(worker.model_runner))),
        "patched": hasattr(WorkerWrapperBase.init_device, "__wrapped__"),
    }
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(*sys.argv[1:])
