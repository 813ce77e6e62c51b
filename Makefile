# Everything runs in an own virtual environment; nothing else on the machine is touched.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
TORCH ?= 2.13.0
OTHER := .venv-$(notdir $(PYTHON))-torch-$(TORCH)
PYTEST_ARGS ?=
GPU_PYTHON ?= 3.12
# Number of processes that run tests; some tests start up to 8 ranks themselves.
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest --durations 20
PARALLEL := -n $(WORKERS)

# One thread per process: with several ranks on few cores more threads only get in each other's way.
export OMP_NUM_THREADS ?= 1
# Else hundreds of processes that tests start would each compile the project.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-browser test-cluster test-versions lint bench bench-sharding gpu-check gpu-wheels clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## own .venv with the core and all extras; again only when pyproject or constraints changed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is older than Python 3.10: choose another with make PYTHON=python3.x" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# DS_BUILD_OPS=0: none of the operations that DeepSpeed could compile is used here.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[all]" -c constraints.txt
	@touch $@

demo: install ## train a small GPT on 8 processes of this machine, and report where its time went
	$(BIN)/dist-gpt launch demo --set run_dir=$(RUN) --set profile.steps=[101,120] $(ARGS)
	$(BIN)/dist-gpt report $(RUN)

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint ## lint, and the tests that cover every pair of options
	$(PYTEST) $(PARALLEL) tests/unit tests/ranks -m "not all_cells" $(PYTEST_ARGS)

test-all: lint ## every test and every cell (in a browser: make test-browser; on a cluster: make test-cluster)
	$(PYTEST) $(PARALLEL) tests --ignore tests/browser --ignore tests/cluster $(PYTEST_ARGS)

# Only versions that pyproject.toml allows can be installed: widen its range first to try a new one.
test-versions: ## the tests of `make test` in a separate environment, e.g. PYTHON=python3.12 TORCH=2.11.0
	test -d $(OTHER) || $(PYTHON) -m venv $(OTHER)
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(OTHER)/constraints.txt
	DS_BUILD_OPS=0 $(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[all]" \
		-c $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pytest --durations 20 $(PARALLEL) tests/unit tests/ranks -m "not all_cells" $(PYTEST_ARGS)

test-browser: install ## the report in a real headless Chromium; as root on Debian it is installed when missing
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null \
		|| { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } >/dev/null
	$(PYTEST) tests/browser $(PYTEST_ARGS)

test-cluster: install ## real Slurm on virtual nodes; needs root (skipped without); on Debian what is missing is installed
	@{ command -v slurmctld && command -v slurmd && command -v munged && command -v tc && command -v mpirun; } >/dev/null \
		|| [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null \
		|| { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq slurm-wlm munge iproute2 openmpi-bin; } >/dev/null
	$(PYTEST) tests/cluster $(PYTEST_ARGS)

bench: install ## what the README compares, measured here
	$(BIN)/python -m benchmarks $(ARGS)

bench-sharding: install ## ZeRO: ours, DeepSpeed and fully_shard in turn, with bytes and memory (an hour on 2 cores)
	$(BIN)/python -m benchmarks sharding $(ARGS)

# Works where nothing can be installed: uses .venv if it exists, else $(PYTHON) and its packages.
gpu-check: ## check one GPU in ten minutes; needs only Python and torch (docs/gpu.md)
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check $(ARGS)

gpu-wheels: ## what gpu-check needs beside torch, into vendor/, for a machine without a network (GPU_PYTHON=3.12)
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --only-binary=:all: --python-version $(GPU_PYTHON) \
		--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -c constraints.txt -d vendor \
		pydantic pydantic-core annotated-types typing-inspection PyYAML safetensors psutil

clean: ## remove caches; run directories and the environment stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
