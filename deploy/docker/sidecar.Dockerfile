# The sidecar alone: no torch, no vLLM. Build from the root of the repository:
#   docker build -f deploy/docker/sidecar.Dockerfile -t maxact-sidecar:0.1.0 .
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY vllm_plugin vllm_plugin
COPY sidecar sidecar
COPY calibration calibration
# No pip in it, and no compiled copies: they would be a third of the image, and starting without them takes a second more.
RUN python -m venv --without-pip /opt/maxact \
    && python -m pip --python /opt/maxact/bin/python install --no-cache-dir --no-compile '.[auth]'

FROM python:3.12-slim-bookworm
COPY --from=build /opt/maxact /opt/maxact
# The same number as in the Kubernetes manifests: vLLM must be able to open the sidecar's socket.
USER 10001:10001
EXPOSE 4471 9471
ENTRYPOINT ["/opt/maxact/bin/maxact"]
CMD ["sidecar"]
