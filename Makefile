# make demo, make test: on a machine with python3 and make, from a fresh clone. The first call makes .venv and installs the versions
# of constraints.txt into it; later calls find it there, until setup.cfg, pyproject.toml or constraints.txt change.
#
#   make test PYTHON=python3.12                         another Python
#   make test PIP_ARGS="--extra-index-url URL"          more arguments for pip, as for the CPU build of torch (README)
#   make test PYTEST_ARGS="tests/layers -x"             more arguments for pytest
#   make test PARALLEL=                                 one process for all tests, as for a debugger

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
PARALLEL ?= -n auto --maxprocesses 4
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAMP_ALL := $(VENV)/.installed-all

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## train a teacher, drop layers and distil on a small corpus: a table, a picture, a report (about 3 minutes)
	$(BIN)/hf-compress demo

test: $(STAMP) ## the default tests (at most 3 minutes on two cores)
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-all: $(STAMP_ALL) ## the slow tests too (about 16 minutes); they need DeepSpeed, which is installed for them
	$(BIN)/python -m pytest -m "not gpu" $(PARALLEL) $(PYTEST_ARGS)

lint: $(STAMP) ## ruff (rules and layout) and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff lay out the code and mend what it can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean: ## remove .venv and everything that was made here
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo_output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): constraints.txt setup.cfg pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	    echo "error: $(PYTHON) was not found. Install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), and Python 3.11, 3.12 or 3.13 is needed. Name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: $(PYTHON) has no venv module. Install it (Debian, Ubuntu: apt install python3-venv) and run make again" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[dev,peft]"
	@touch $@

$(STAMP_ALL): $(STAMP)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[dev,peft,deepspeed]"
	@touch $@
