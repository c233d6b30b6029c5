# `make demo` and `make test` work on a fresh machine with Python 3.11+ and make. `make help` lists the rest.
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(or $(shell for p in python3 python3.13 python3.12 python3.11; do $$p $(IS_NEW_ENOUGH) && echo $$p && break; done),python3)
VENV   ?= .venv
DOC    ?=
BIN    := $(VENV)/bin

# data sets beside the repository, when there are any; tests that need them are skipped otherwise
ifndef TRILEVEL_DATA
ifneq ($(wildcard ../shared/data/.),)
export TRILEVEL_DATA := $(abspath ../shared/data)
endif
endif

SETUP := pyproject.toml constraints.txt
NATIVE := trilevel/attention/native
# the pinned torch goes first and alone, so that no other package can pull another build of it
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format types bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

$(BIN)/python:
	@$(PYTHON) $(IS_NEW_ENOUGH) || { \
	  echo "error: '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not there); Python 3.11 or later is needed:" \
	    "make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no venv module; install it (Debian, Ubuntu: apt install python3-venv) or name" \
	    "another: make PYTHON=/path/to/python3 ..." >&2; exit 2; }
	@echo "setting up $(VENV) (once, some minutes)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

$(VENV)/.torch: $(SETUP) | $(BIN)/python
	@$(PIP_INSTALL) torch numpy
	@touch $@

# rebuilt when a source changed; works without a compiler, and says so
$(VENV)/.native: setup.py $(wildcard $(NATIVE)/*.h $(NATIVE)/*.cpp $(NATIVE)/*.py) | $(BIN)/python
	@$(BIN)/python $(NATIVE)/build.py
	@touch $@

$(VENV)/.demo: $(VENV)/.torch | $(VENV)/.native
	@$(PIP_INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.all: $(VENV)/.torch | $(VENV)/.native
	@$(PIP_INSTALL) --editable '.[all]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo $(VENV)/.native  ## summarise a 10,000-word document, dense against trilevel (DOC=path for your own)
	@$(BIN)/trilevel demo $(if $(DOC),--doc "$(DOC)")

test: lint types $(VENV)/.native  ## lint, types and the default tests
	@$(BIN)/pytest -n auto --dist loadfile

test-all: lint types $(VENV)/.native  ## everything, the slow, gpu, arm, browser and ray tests included
	@$(BIN)/pytest -n auto --dist loadfile -m ""

lint: $(VENV)/.all  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .

types: $(VENV)/.all  ## mypy, strict
	@$(BIN)/mypy

format: $(VENV)/.all  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

bench: $(VENV)/.all $(VENV)/.native  ## measure, keep benchmarks/results/*.json, rewrite the README figures
	@mkdir -p out
	@for case in attention levels; do \
	  $(BIN)/trilevel bench $$case --out benchmarks/results/$$case.json || failed=1; done; \
	  $(BIN)/trilevel demo --json > out/demo.line && \
	  $(BIN)/python scripts/demo_result.py < out/demo.line || failed=1; \
	  $(BIN)/python scripts/figures.py; exit $${failed:-0}

clean:  ## remove what make and the tests left, the environment included
	@rm -rf $(VENV) $(NATIVE)/lib out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
