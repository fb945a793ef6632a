# Everything is made in .venv/ and out/. A Python from 3.10 to 3.12 and make must be there, for the tests and the
# kernels also a C++17 compiler.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SHELL  := /bin/bash

EXAMPLE := examples/shapes
DEMO    := out/shapes-atp

# Two processes for the tests, one thread each: they are many small computations.
TEST_PROCESSES ?= 2

FUZZ_SECONDS ?= 60

.PHONY: help demo test lint types format unit kernels plugin cpp cpp-sanitize cpp-fuzz cpp-tensorrt cross-jetson engines test-gpu clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## Export the example checkpoint, ask it about a picture, draw the kept tokens
	@mkdir -p out
	$(BIN)/edgeprune export $(EXAMPLE)/checkpoint -o $(DEMO)
	$(BIN)/edgeprune run $(DEMO) --image $(EXAMPLE)/pictures/scene4.png \
		--prompt "which letter is in the green diamond?" --overlay $(DEMO).png
	@echo "The kept tokens are drawn in $(DEMO).png"

test: $(STAMP) lint types unit ## Everything that must pass: lint, format, types, tests

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

unit: $(STAMP) ## The tests alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadgroup

kernels: $(STAMP) ## Build the CUDA kernels and their references into out/plugins
	$(BIN)/python -m edgeprune.plugins.build

cpp: $(STAMP) ## Build the C++ library and edgeprune-run into out/cpp
	$(BIN)/python -m edgeprune.runtimes.cpp.build

cpp-sanitize: $(STAMP) ## Run the C++ library's tests with AddressSanitizer and UndefinedBehaviorSanitizer
	EDGEPRUNE_CPP_SANITIZE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/runtimes/cpp

cpp-fuzz: $(STAMP) ## Fuzz the C++ library's readers, three targets for FUZZ_SECONDS each; needs clang
	@test -f $(DEMO)/manifest.json || $(BIN)/edgeprune export $(EXAMPLE)/checkpoint -o $(DEMO)
	$(BIN)/python -m edgeprune.runtimes.cpp.fuzzing $(DEMO) --seconds $(FUZZ_SECONDS)

cpp-tensorrt: $(STAMP) ## Build and test the C++ TensorRT backend on a double; TENSORRT_ROOT="DIR …" names headers
	@set -e; for root in $(or $(TENSORRT_ROOT),""); do \
		TENSORRT_ROOT="$$root" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/runtimes/cpp/test_cpp_tensorrt.py; \
	done

cross-jetson: $(STAMP) ## Pack the C++ runtime for Jetson into out/jetson; TENSORRT_ROOT=DIR names headers
	$(BIN)/python -m edgeprune.runtimes.jetson.package

plugin: $(STAMP) ## Compile and test TensorRT's plugins; TENSORRT_ROOT="DIR …" names headers
	@set -e; for root in $(or $(TENSORRT_ROOT),""); do \
		export TENSORRT_ROOT="$$root" OMP_NUM_THREADS=1; \
		$(BIN)/python -m pytest -q tests/plugins/test_tensorrt_plugin.py tests/plugins/test_plugin_engines.py; \
		$(BIN)/python -m edgeprune.plugins.build; \
	done

engines: $(STAMP) ## Build the engines of a random 0.4 B LLaVA for three GPUs; none is needed
	@mkdir -p out
	@set -o pipefail; $(BIN)/python benchmarks/engines.py | tee out/engines.md

test-gpu: $(STAMP) ## Run kernels and engines on an NVIDIA GPU; without one, say so
	$(BIN)/python tests/plugins/run_on_gpu.py

format: $(STAMP) ## Rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what was built; the environment stays (delete .venv for a fresh one)
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# An interrupted set-up leaves no stamp, and an environment without a working pip is made anew.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || { \
		echo "edgeprune needs Python 3.10, 3.11 or 3.12, '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>&1): try make PYTHON=python3.12"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		echo "Creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing into $(VENV); the first time this downloads PyTorch"
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --no-input \
		-c constraints.txt -e '.[dev]' \
		| awk '/^ *(Downloading|Using cached) / && !/\.metadata/ { print "  " $$0; fflush() } \
			/^Installing collected/ { print "  Unpacking"; fflush() }'
	@touch $@
