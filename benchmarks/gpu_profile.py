"""Which kernels observing adds to a decode step: counts and GPU time per kernel, without and with maxact.

    python benchmarks/gpu_profile.py --model DIR --sites serving|all|none --batch 32 --out F.json

Profiles 20 engine steps of pure decode (CUDA-graph replay) with torch's profiler. Last line:
``RESULT {"sites": .., "kernels_per_step": .., "gpu_us_per_step": .., "step_us": ..}``; the file lists every kernel.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import time
from pathlib import Path

STEPS = 20


def main() -> None:
    """One engine, one profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sites", default="none")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm import LLM, SamplingParams, TokensPrompt

    extra = {} if args.sites == "none" else {"additional_config": {"maxact": {"sites": args.sites}}}
    engine = LLM(
        args.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=4096,
        max_num_seqs=256,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.85,
        compilation_config={"cudagraph_capture_sizes": sorted({1, 2, 4, 8, 16, 32, 64, 128, 256, args.batch})},
        **extra,
    ).llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)
    for index in range(args.batch):
        engine.add_request(str(index), TokensPrompt(prompt_token_ids=[100 + index] * 128), sampling)
    for _ in range(40):
        engine.step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    torch.cuda.synchronize()
    step_us = 1e6 * (time.perf_counter() - started) / STEPS
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            engine.step()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name][0] += 1 / STEPS
            kernels[event.name][1] += event.self_device_time_total / STEPS
    table = sorted(([name, round(n, 2), round(us, 2)] for name, (n, us) in kernels.items()), key=lambda row: -row[2])
    Path(args.out).write_text(json.dumps(table, indent=1))
    result = {
        "sites": args.sites,
        "batch": args.batch,
        "kernels_per_step": round(sum(row[1] for row in table), 1),
        "gpu_us_per_step": round(sum(row[2] for row in table), 1),
        "step_us": round(step_us, 1),
    }
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
