"""The contract between plugin and sidecar: the statistic table, the codec and the generated messages. No torch, no vllm."""
