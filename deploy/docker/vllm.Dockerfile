# vLLM with the plugin. maxact needs nothing that a vLLM image lacks. Build from the root of the repository:
#   docker build -f deploy/docker/vllm.Dockerfile -t vllm-maxact:0.1.0 .
ARG VLLM_VERSION=v0.32.0
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY vllm_plugin vllm_plugin
COPY sidecar sidecar
COPY calibration calibration
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM vllm/vllm-openai:${VLLM_VERSION}
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python3 -m pip install --no-cache-dir /wheels/*.whl
