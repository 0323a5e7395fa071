"""maxact sidecar: merges ranks, judges headroom, remembers, exposes. No torch, no vllm."""

from maxact_proto import __version__

__all__ = ["__version__"]
