"""Which kernels observing adds to a decode step: counts and GPU time per kernel, for several selections of sites.

    python benchmarks/gpu_profile.py --model DIR --sites none,serving,all --batch 32 --out F.json

One engine after another, dummy weights; each is timed over pure decode steps (CUDA-graph replay), then profiled over as
many with torch's profiler. ``host_us`` is the time our code holds the model's thread per step; the file lists every
kernel. Last line: ``RESULT`` with ``step_us``, ``host_us``, ``kernels_per_step`` and ``gpu_us_per_step`` per selection.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

STEPS = 40


def main() -> None:
    """One engine and one profile per selection of sites."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sites", type=lambda text: text.split(","), default=["none", "serving", "all"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--memory", type=float, default=0.2)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    spent = _watch_host_time()
    tables, result = {}, {}
    for sites in args.sites:
        engine = _engine(args, sites)
        step_us, host_us = _time_steps(engine, spent)
        tables[sites] = _profile(engine)
        result[sites] = {
            "step_us": step_us,
            "host_us": host_us,
            "kernels_per_step": round(sum(row[1] for row in tables[sites]), 1),
            "gpu_us_per_step": round(sum(row[2] for row in tables[sites]), 1),
        }
        print(json.dumps({sites: result[sites]}), flush=True)
    Path(args.out).write_text(json.dumps(tables, indent=1))
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)


def _watch_host_time() -> list[float]:
    from maxact_vllm.worker import Capture

    spent: list[float] = []
    after_step = Capture.after_step

    def timed(self: Any, *args: Any) -> None:
        started = time.perf_counter()
        after_step(self, *args)
        spent.append(time.perf_counter() - started)

    Capture.after_step = timed  # type: ignore[method-assign]
    return spent


def _engine(args: argparse.Namespace, sites: str) -> Any:
    from vllm import LLM, SamplingParams, TokensPrompt

    extra: dict[str, Any] = {} if sites == "none" else {"additional_config": {"maxact": {"sites": sites}}}
    engine = LLM(
        args.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=max(8, args.batch),
        enable_prefix_caching=False,
        gpu_memory_utilization=args.memory,
        compilation_config={"cudagraph_capture_sizes": sorted({1, 2, 4, 8, args.batch})},
        **extra,
    ).llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=60 + 2 * STEPS, ignore_eos=True, detokenize=False)
    for index in range(args.batch):
        engine.add_request(str(index), TokensPrompt(prompt_token_ids=[100 + index] * 64), sampling)
    for _ in range(40):
        engine.step()
    return engine


def _time_steps(engine: Any, spent: list[float]) -> tuple[float, float]:
    import torch

    spent.clear()
    times = []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    host = statistics.median(spent) if spent else 0.0
    return round(1e6 * statistics.median(times), 1), round(1e6 * host, 1)


def _profile(engine: Any) -> list[list[Any]]:
    """Rows of (kernel, launches per step, microseconds per step), longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    steps = STEPS // 2
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name][0] += 1 / steps
            kernels[event.name][1] += event.self_device_time_total / steps
    rows = [[name, round(count, 2), round(us, 2)] for name, (count, us) in kernels.items()]
    return sorted(rows, key=lambda row: -row[2])


if __name__ == "__main__":
    main()
