# The sidecar alone: no torch, no vLLM. Build from the root of the repository:
#   docker build -f deploy/docker/sidecar.Dockerfile -t maxact-sidecar:0.1.0 .
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY vllm_plugin vllm_plugin
COPY sidecar sidecar
COPY calibration calibration
RUN python -m venv /opt/maxact && /opt/maxact/bin/pip install --no-cache-dir '.[auth]'

FROM python:3.12-slim-bookworm
COPY --from=build /opt/maxact /opt/maxact
# The same number as in the Kubernetes manifests: vLLM must be able to open the sidecar's socket.
USER 10001:10001
EXPOSE 4471 9471
ENTRYPOINT ["/opt/maxact/bin/maxact"]
CMD ["sidecar"]
