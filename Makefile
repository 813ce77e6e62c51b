# Everything runs in a separate virtual environment; nothing else on the machine is changed.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
TORCH ?= 2.13.0
OTHER := .venv-$(notdir $(PYTHON))-torch-$(TORCH)
PYTEST_ARGS ?=
GPU_PYTHON ?= 3.12
# Number of processes that run tests; some tests start up to 8 ranks of their own.
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest --durations 20
PARALLEL := -n $(WORKERS)

# One thread per process: with several ranks on few cores, more threads compete with each other.
export OMP_NUM_THREADS ?= 1
# Otherwise, each of the hundreds of processes that tests start would compile the project.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-browser test-cluster test-versions lint bench bench-sharding gpu-check gpu-wheels clean

help: ## print this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## create .venv with all extras; repeated only if pyproject.toml or constraints.txt changed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is older than Python 3.10: choose another with make PYTHON=python3.x" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# DS_BUILD_OPS=0: DeepSpeed compiles none of its operations, as none is used here.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[all]" -c constraints.txt
	@touch $@

demo: install ## train a small GPT in 8 processes on this machine, and report where its time went
	$(BIN)/dist-gpt launch demo --set run_dir=$(RUN) --set profile.steps=[101,120] $(ARGS)
	$(BIN)/dist-gpt report $(RUN)

lint: install ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

test: lint ## run lint, and the tests that cover every pair of options
	$(PYTEST) $(PARALLEL) tests/unit tests/ranks -m "not all_cells" $(PYTEST_ARGS)

test-all: lint ## run every test and every cell, except those of make test-browser and make test-cluster
	$(PYTEST) $(PARALLEL) tests --ignore tests/browser --ignore tests/cluster $(PYTEST_ARGS)

# Only versions that pyproject.toml allows can be installed: to try a new one, widen its range first.
test-versions: ## run the tests of `make test` in a separate environment, e.g. PYTHON=python3.12 TORCH=2.11.0
	test -d $(OTHER) || $(PYTHON) -m venv $(OTHER)
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(OTHER)/constraints.txt
	DS_BUILD_OPS=0 $(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[all]" \
		-c $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pytest --durations 20 $(PARALLEL) tests/unit tests/ranks -m "not all_cells" $(PYTEST_ARGS)

test-browser: install ## test the report in headless Chromium; as root on Debian, installs it if missing
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null \
		|| { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } >/dev/null
	$(PYTEST) tests/browser $(PYTEST_ARGS)

test-cluster: install ## test on real Slurm with virtual nodes; needs root (else skipped); on Debian, installs Slurm
	@{ command -v slurmctld && command -v slurmd && command -v munged && command -v tc && command -v mpirun; } >/dev/null \
		|| [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null \
		|| { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq slurm-wlm munge iproute2 openmpi-bin; } >/dev/null
	$(PYTEST) tests/cluster $(PYTEST_ARGS)

bench: install ## measure the README's benchmarks on this machine
	$(BIN)/python -m benchmarks $(ARGS)

bench-sharding: install ## compare ZeRO with DeepSpeed and fully_shard: speed, bytes, memory (an hour on 2 cores)
	$(BIN)/python -m benchmarks sharding $(ARGS)

# Needs no installation: uses .venv if it exists, else $(PYTHON) and its packages.
gpu-check: ## check one GPU in ten minutes; needs only Python and torch (docs/gpu.md)
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check $(ARGS)

gpu-wheels: ## download into vendor/ what gpu-check needs besides torch and numpy (GPU_PYTHON=3.12)
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --only-binary=:all: --python-version $(GPU_PYTHON) \
		--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -c constraints.txt -d vendor \
		pydantic pydantic-core annotated-types typing-inspection PyYAML safetensors psutil

clean: ## remove caches; run directories and the environment stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
