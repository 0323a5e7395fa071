# vLLM with the plugin. maxact needs nothing that a vLLM image lacks. Build from the root of the repository:
#   docker build -f deploy/docker/vllm.Dockerfile -t vllm-maxact:0.1.0 .
ARG VLLM_VERSION=v0.32.0
FROM vllm/vllm-openai:${VLLM_VERSION}
COPY pyproject.toml README.md LICENSE /opt/maxact-src/
COPY protos /opt/maxact-src/protos
COPY vllm_plugin /opt/maxact-src/vllm_plugin
COPY sidecar /opt/maxact-src/sidecar
COPY calibration /opt/maxact-src/calibration
RUN python3 -m pip install --no-cache-dir /opt/maxact-src
