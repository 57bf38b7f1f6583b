# One environment for working on ART, and the two commands of the README: `make demo` and `make test`.
# `make setup` is what both need first; it is done once and again whenever a pyproject.toml or constraints.txt changes.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
DISTRIBUTIONS := . $(patsubst %/pyproject.toml,%,$(wildcard engines/*/pyproject.toml plugins/*/pyproject.toml)) conformance_tests
EDITABLE := $(addprefix -e ,$(addprefix ./,$(DISTRIBUTIONS)))
READY := $(VENV)/.ready
OPENAI2_VENV := .venv-openai2
OPENAI2_READY := $(OPENAI2_VENV)/.ready
VERIFIERS_VENV := .venv-verifiers
VERIFIERS_READY := $(VERIFIERS_VENV)/.ready
# The rest of constraints.txt holds there too; verifiers has an openai of its own.
VERIFIERS_CONSTRAINTS := $(VERIFIERS_VENV)/constraints.txt
VERIFIERS_NEEDS := '.[verifiers]' engines/art-engine-kit engines/art-training-kit engines/art-engine-torch plugins/art-runtime \
    plugins/art-gateway plugins/art-tracker-files plugins/art-backend-local conformance_tests
MUTANTS_VENV := .venv-mutants
# uv, looking where pip looks; needs nothing of ours installed.
INSTALL := plugins/art-runtime/src/art_runtime/environments/indexes.py
PYTEST := $(BIN)/python -m pytest
# Fast tests wait for timers as often as they compute; what shares live servers goes to two workers file by file.
IN_THREE := -n 3
FILES_IN_TWO := -n 2 --dist loadfile
BENCHMARKS := $(filter-out benchmarks/gpu_check.py,$(wildcard benchmarks/*.py))
# Engines in environments of their own; their tests fail without.
TESTED_ENGINES := vllm sglang torchtune unsloth
APT_GET := DEBIAN_FRONTEND=noninteractive apt-get --yes --quiet --no-install-recommends

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Modules are compiled once, not by each of the processes that a test starts, even where whoever calls make keeps no bytecode.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup engines postgresql demo test test-without-engines test-all test-fast test-openai2 test-verifiers lint format reference names mutants wheels conformance foreign-engines benchmarks gpu-check clean

help:  ## Say what can be made
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## Make the environment in .venv (Python 3.11 or newer)

$(READY): constraints.txt requirements-dev.txt $(addsuffix /pyproject.toml,$(DISTRIBUTIONS))
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found. Install it, or: make setup PYTHON=/path/to/python" >&2; exit 1; }
	@$(BIN)/python -P -m pip --version >/dev/null 2>&1 \
	    || { echo "Making an environment in $(VENV), of $$($(PYTHON) --version) ..."; $(PYTHON) -P -m venv $(VENV); }
	@echo "Fetching uv, which installs the rest ..."
	@$(BIN)/python -P -m pip install --quiet --constraint constraints.txt uv || echo "There is no uv to be had; pip installs the rest, more slowly." >&2
	@echo "Installing ART and what it needs into $(VENV): about $$(grep -c == constraints.txt) packages, torch the largest. A minute or two ..."
	@if test -x $(BIN)/uv; then \
	    $(BIN)/python -P $(INSTALL) --constraint constraints.txt $(EDITABLE) --requirement requirements-dev.txt; \
	else \
	    $(BIN)/python -P -m pip install --progress-bar off --constraint constraints.txt $(EDITABLE) --requirement requirements-dev.txt; \
	fi
	@touch $(READY)

demo: $(READY)  ## Reinforcement learning on real weights, on this machine's CPU: watch the reward rise
	@ART_TRACKIO_MODE=disabled ART_MLFLOW_MODE=disabled $(BIN)/python examples/customer_replies.py $(ARGS)

engines: $(READY)  ## Make the environments of vLLM, SGLang, torchtune and Unsloth that the tests run in, where they aren't there yet
	@for engine in $(TESTED_ENGINES); do $(BIN)/art engines install $$engine --flavour cpu; done

# PostgreSQL for the tests of `art serve`, where it may be installed; elsewhere they are skipped and say so.
postgresql:
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 \
	    || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	         && echo "Installing PostgreSQL, which the tests of art serve start for themselves ..." \
	         && { $(APT_GET) install postgresql >/dev/null 2>&1 \
	              || { $(APT_GET) update >/dev/null 2>&1 && $(APT_GET) install postgresql >/dev/null 2>&1; }; }; } \
	    || echo "There is no PostgreSQL here; the tests that need one are skipped. On Debian: apt-get install postgresql"

# What needs no engine is tested while the engines' environments are made.
test: $(READY) $(OPENAI2_READY)  ## The tests, on real weights and real servers, vLLM, SGLang, torchtune and Unsloth among them
ifeq ($(ARGS),)
	@$(MAKE) --no-print-directory --jobs=2 engines postgresql test-without-engines
	@$(MAKE) --no-print-directory test-verifiers
	@$(PYTEST) $(FILES_IN_TWO) -m "slow and not exhaustive"
else
	@$(MAKE) --no-print-directory lint engines postgresql test-openai2
	@$(MAKE) --no-print-directory test-verifiers ARGS=
	@$(PYTEST) -m "not exhaustive" $(ARGS)
endif

test-without-engines: $(READY) $(OPENAI2_READY)
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test-openai2
	@$(MAKE) --no-print-directory test-fast

test-all: $(READY) $(OPENAI2_READY) lint engines postgresql  ## And every broken implementation against live checks: over an hour
	@$(MAKE) --no-print-directory test-openai2
	@$(MAKE) --no-print-directory test-verifiers ARGS='-m ""'
	@$(PYTEST) $(ARGS)

test-fast: $(READY)  ## The tests that need no weights and no servers, and half a second at most: two minutes
	@$(PYTEST) $(IN_THREE) -m "not slow" $(ARGS)

$(OPENAI2_READY): pyproject.toml
	@test -x $(OPENAI2_VENV)/bin/python || $(PYTHON) -m venv $(OPENAI2_VENV)
	@echo "Installing the client with openai 2.x into $(OPENAI2_VENV) ..."
	@$(OPENAI2_VENV)/bin/python -m pip install --quiet -e . -e plugins/art-tracker-files "openai[aiohttp]>=2,<3" \
	    pytest pytest-asyncio pytest-timeout hypothesis
	@touch $(OPENAI2_READY)

test-openai2: $(OPENAI2_READY)  ## The client's tests again, with openai 2.x
	@$(OPENAI2_VENV)/bin/python -m pytest -q tests/client

$(VERIFIERS_READY): $(READY) pyproject.toml constraints.txt
	@test -x $(VERIFIERS_VENV)/bin/python || $(PYTHON) -P -m venv $(VERIFIERS_VENV)
	@echo "Installing ART with verifiers into $(VERIFIERS_VENV) ..."
	@grep -v '^openai==' constraints.txt > $(VERIFIERS_CONSTRAINTS)
	@# verifiers runs its programs with uv.
	@$(VERIFIERS_VENV)/bin/python -P -m pip install --quiet --constraint $(VERIFIERS_CONSTRAINTS) uv
	@$(VERIFIERS_VENV)/bin/python -P $(INSTALL) --quiet --constraint $(VERIFIERS_CONSTRAINTS) $(addprefix -e ,$(VERIFIERS_NEEDS)) \
	    matplotlib pytest pytest-asyncio pytest-timeout pytest-xdist hypothesis
	@touch $(VERIFIERS_READY)

test-verifiers: $(VERIFIERS_READY)  ## Environments of verifiers, in an environment that has it
	@$(VERIFIERS_VENV)/bin/python -m pytest -q tests/environments -m "not exhaustive" $(ARGS)

lint: $(READY)  ## ruff and mypy
	@$(BIN)/ruff format --check --quiet . || { echo "Some files are not formatted. Run: make format" >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/mypy benchmarks --exclude benchmarks/peers

format: $(READY)  ## Format and mend what ruff can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

reference: $(READY)  ## Make the reference of hooks and protocols in docs/ of their docstrings, and the pages of requirements and of what holds each promise
	@$(BIN)/python tests/docs/interface_reference.py
	@$(BIN)/python tests/docs/requirements_page.py
	@$(BIN)/python tests/docs/traceability.py

names: $(READY)  ## Ask the package index whether the names of our distributions are free or ours
	@$(BIN)/python tests/packaging/index_names.py

mutants: $(READY)  ## Change the code of publication and leases in each place, and count what its fast tests notice: a few minutes
	@test -x $(MUTANTS_VENV)/bin/cosmic-ray || { $(PYTHON) -m venv $(MUTANTS_VENV); $(MUTANTS_VENV)/bin/python -m pip install --quiet "cosmic-ray>=8.7,<9"; }
	@$(BIN)/python tests/mutants.py $(MUTANTS_VENV)/bin

wheels: $(READY)  ## Build every distribution into dist/
	@for distribution in $(DISTRIBUTIONS); do $(BIN)/python -m build --wheel --outdir dist $$distribution >/dev/null && echo "built $$distribution"; done
	@ls dist

conformance: engines  ## Hold every engine, backend and plugin against its suites: docs/conformance/matrix.md
	@$(BIN)/art-conformance matrix --folder docs/conformance $(ARGS) \
	    --tests serverless=plugins/art-backend-serverless/tests/test_serverless_conformance.py \
	    --tests tracker-files=plugins/art-tracker-files/tests/test_tracker_files_conformance.py \
	    --tests trackio=plugins/art-trackio/tests/test_trackio_conformance.py \
	    --tests wandb=plugins/art-wandb/tests/test_wandb_conformance.py \
	    --tests mlflow=plugins/art-mlflow/tests/test_mlflow_conformance.py

foreign-engines: $(READY)  ## Hold the engines of examples/foreign_engines against their suite, from wheels: docs/foreign-engines.md
	@mkdir -p docs/conformance/foreign
	@ART_KEEP_REPORTS=$(CURDIR)/docs/conformance/foreign $(PYTEST) -q tests/packaging/test_foreign_engines.py -k what_the_page_says
	@$(BIN)/python tests/packaging/foreign_engines.py

benchmarks: $(READY)  ## Run every benchmark; each prints the machine and the versions
	@for benchmark in $(BENCHMARKS); do echo "== $$benchmark"; $(BIN)/python $$benchmark; done

gpu-check: $(READY)  ## On a CUDA machine: everything that needs a GPU, with what is installed there, as a table
	@$(BIN)/python benchmarks/gpu_check.py $(ARGS)

clean:  ## Remove environments and build products (not runs, not caches outside the checkout)
	rm -rf $(VENV) $(OPENAI2_VENV) $(VERIFIERS_VENV) $(MUTANTS_VENV) dist build
