"""Run as a program: one in-process vLLM engine, observed, that serves prompts as they are asked for.

``serve_prompts.py MODEL ENDPOINT``. Writes ``{"special": [token id, ...]}`` when it is up; then, for every line
``{"prompts": [text or token ids, ...], "max_tokens": n}`` on stdin, ``{"tokens": how many the prompts have}``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(model: str, endpoint: str) -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints is no answer
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        model=model,
        max_model_len=4096,
        max_num_batched_tokens=4096,
        max_num_seqs=16,
        enable_prefix_caching=False,
        dtype="float32",  # several times as fast as bfloat16 where the CPU has no instructions for it
        enforce_eager=True,
        compilation_config={"custom_ops": ["none"]},
        additional_config={"maxact": {"endpoint": endpoint, "interval": 0.2}},
    )
    tokenizer: Any = llm.get_tokenizer()

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    answer(special=sorted(tokenizer.get_added_vocab().values()))
    for line in sys.stdin:
        asked = json.loads(line)
        ids = [tokenizer.encode(each) if isinstance(each, str) else each for each in asked["prompts"]]
        sampling = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True, detokenize=False)
        llm.generate([TokensPrompt(prompt_token_ids=each) for each in ids], sampling, use_tqdm=False)
        answer(tokens=sum(map(len, ids)))


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(*sys.argv[1:])
