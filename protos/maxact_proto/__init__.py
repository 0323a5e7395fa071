"""The contract between plugin and sidecar: statistic table, codec and generated messages. No torch, no vllm."""

__version__ = "0.1.0"
