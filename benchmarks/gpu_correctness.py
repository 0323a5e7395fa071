"""Statistics in CUDA-graph replay against native eager, real weights, padded and unpadded batch sizes.

    python benchmarks/gpu_correctness.py --model DIR --mode native|piecewise|full --runner v1|v2 --out F.npz
    python benchmarks/gpu_correctness.py --compare NATIVE.npz OTHER.npz ...

A run serves batches of 1, 3, 4, 7, 8 and 33 requests over prompts drawn once, with every decoded token forced to one
id, so that all runs see the same inputs. It checks by itself that nothing arrived before the first request (warm-up,
profile and capture runs) and that token counts are exact, and saves the extrema of every batch. The comparison prints,
per run and batch, the worst and median relative deviation of absmax over all sites and phases.

Last line of a run: ``RESULT {"mode": .., "runner": .., "tokens": "exact", "warmup": "empty", "sites": N}``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "vllm_plugin"))

BATCHES = (1, 3, 4, 7, 8, 33)
DECODED = 6
COMPILATION: dict[str, dict[str, Any]] = {
    "native": {"custom_ops": ["none"]},
    "piecewise": {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 40, 64, 128, 256]},
    "full": {"cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 40, 64, 128, 256]},
}


def main() -> None:
    """One run or one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--mode", choices=list(COMPILATION))
    parser.add_argument("--runner", choices=["v1", "v2"], default="v2")
    parser.add_argument("--out")
    parser.add_argument("--compare", nargs="+", default=[])
    args = parser.parse_args()
    if args.compare:
        compare(*args.compare)
        return
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if args.runner == "v2" else "0"
    from receiver import Listening

    with Listening() as listening:
        run(args, listening)
    os._exit(0)


def run(args: argparse.Namespace, listening: Any) -> None:
    """Serve all batches, check counts, save extrema ``[phases, sites, 2]`` per batch."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        args.model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=64,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.3,
        enforce_eager=args.mode == "native",
        compilation_config=COMPILATION[args.mode],
        additional_config={"maxact": {"sites": "all", "endpoint": listening.endpoint, "interval": 0.2}},
    )
    receiver = listening.receiver
    time.sleep(1.5)
    early = receiver.tokens()
    assert sum(early) == 0, f"windows before the first request: {early}"
    assert not np.isfinite(receiver.total()[..., :2]).any(), "statistics before the first request"
    sampling = SamplingParams(
        temperature=0, max_tokens=DECODED, ignore_eos=True, detokenize=False, allowed_token_ids=[345]
    )
    rng = np.random.default_rng(0)
    saved = {}
    for batch in BATCHES:
        prompts = [rng.integers(10, 40_000, 3 + index % 9).tolist() for index in range(batch)]
        begin = len(receiver.windows["pp0tp0"])
        llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)
        time.sleep(0.8)
        expected = [batch, sum(map(len, prompts)) - batch, batch * (DECODED - 1)]
        counted = receiver.tokens(since=begin)
        assert counted == expected, f"batch {batch}: tokens {counted}, expected {expected}"
        saved[str(batch)] = receiver.total(since=begin)
    np.savez(args.out, sites=np.array(receiver.sites()), **saved)
    sites = len(receiver.sites())
    result = {"mode": args.mode, "runner": args.runner, "tokens": "exact", "warmup": "empty", "sites": sites}
    print("RESULT " + json.dumps(result), flush=True)


def compare(reference: str, *others: str) -> None:
    """Print how far the absmax of each run is from the reference's."""
    base = np.load(reference)
    for path in others:
        other = np.load(path)
        for batch in map(str, BATCHES):
            own, expected = _absmax(other[batch]), _absmax(base[batch])
            seen = np.isfinite(expected)
            missing = int((seen != np.isfinite(own)).sum())
            deviation = np.abs(own[seen] / expected[seen] - 1)
            worst = base["sites"][np.nonzero(seen)[1][deviation.argmax()]]
            peak = bool(own.max(0).argmax() == expected.max(0).argmax())
            print(
                f"{Path(path).stem:16} batch {batch:>2}: {seen.sum()} (phase, site) pairs, {missing} missing, absmax "
                f"deviation median {100 * np.median(deviation):.3f} %, 95th percentile "
                f"{100 * np.quantile(deviation, 0.95):.2f} %, worst {100 * deviation.max():.2f} % ({worst}), "
                f"same site of the maximum: {peak}"
            )


def _absmax(values: Any) -> Any:
    return np.maximum(values[..., 0], -values[..., 1])


if __name__ == "__main__":
    main()
