"""maxact sidecar: merges ranks, judges headroom, remembers, exposes. No torch, no vllm."""
