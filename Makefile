# Everything works on a fresh checkout: `demo` and `test` set up .venv first and reuse it while nothing changed.
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3.12),python3)
BIN := .venv/bin
# Test files at a time; engines on a GPU would take each other's memory.
JOBS ?= $(if $(shell command -v nvidia-smi),1,2)
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test check setup proto dashboards metrics-page e2e-alert bench-overhead bench-sidecar architectures versions clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 20

demo: setup ## serve SmolLM2, calibrate, provoke flags; ONCE=1 checks itself; MODEL= PORT= HTTP= GRPC=
	@$(BIN)/python scripts/demo.py $(if $(ONCE),--once) $(if $(MODEL),--model "$(MODEL)") \
	  $(if $(PORT),--port $(PORT)) $(if $(HTTP),--http $(HTTP)) $(if $(GRPC),--grpc $(GRPC))

test: setup check ## format, lint, types, protocol and all tests; TESTS= and ARGS= narrow pytest down, JOBS= files at a time
	@$(PYTHON) scripts/bootstrap.py --servers
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 20 $(ARGS) $(TESTS)

check: setup ## format, lint, types and protocol only
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint

setup: ## make or complete .venv
	@$(PYTHON) scripts/bootstrap.py

proto: setup ## generate protos/maxact_proto/v1/*_pb2* from telemetry.proto
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=protos --pyi_out=protos --grpc_python_out=protos \
	  protos/maxact_proto/v1/telemetry.proto

dashboards: setup ## generate grafana/dashboards/*.json
	$(BIN)/python -W ignore::DeprecationWarning -m grafana.build

metrics-page: setup ## generate docs/metrics.md
	$(BIN)/python scripts/metrics_page.py

e2e-alert: setup ## from a prompt to a notification: vLLM, sidecar, Prometheus, Alertmanager, webhook
	@$(PYTHON) scripts/bootstrap.py --servers
	PYTHONPATH=. $(BIN)/python scripts/e2e_alert.py

bench-overhead: setup ## cost of observing on this machine; ARGS= for benchmarks/bench_overhead.py
	$(BIN)/python benchmarks/bench_overhead.py --model "$$($(BIN)/python -c \
	  'from maxact_calibration.model import smollm2; print(smollm2())')" $(ARGS)

bench-sidecar: setup ## what a sidecar costs on this machine; ARGS= for benchmarks/bench_sidecar.py
	@$(PYTHON) scripts/bootstrap.py --servers
	$(BIN)/python benchmarks/bench_sidecar.py $(ARGS)

architectures: setup ## serve a tiny model of every architecture, write docs/architectures.md; resumes; ARGS= narrows
	$(BIN)/python scripts/architectures.py $(ARGS)

versions: setup ## tests of the plugin with each supported vLLM, in environments of their own; VERSIONS= TESTS= narrow
	@$(PYTHON) scripts/bootstrap.py --servers
	@$(PYTHON) scripts/versions.py $(if $(VERSIONS),--vllm $(VERSIONS)) $(if $(TESTS),--tests $(TESTS))

clean: ## remove .venv and caches of this checkout
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache
