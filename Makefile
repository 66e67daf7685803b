# Everything here works from a fresh clone with Python 3.11+, make and a C compiler. `make help` lists the targets.
#   PYTHON=python3.12   the interpreter that creates .venv (default: python3)
#   ARGS='...'          passed on to the command behind `run`, `test` and `check`; for tests one by one: ARGS='-n 0'

SHELL = /bin/sh
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Tests run in one process more than there are CPUs, up to four: those that start Ray stand in queues of their own, where
# they wait most of the time (tests/conftest.py).
PROCESSES := $(shell $(PYTHON) -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))')
PYTEST := $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder
UNIT := not ray and not s3 and not k8s and not gpu and not slow

.DEFAULT_GOAL := help
.PHONY: help install run test check lint format chart-files kube-tools clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do printf '  make %-11s %s\n' "$$name" "$$text"; done

install: $(STAMP)  ## create .venv with the pinned versions; does nothing when it is up to date

run: $(STAMP)  ## train the digits ResNet on an embedded cluster (ARGS="--set seed=2")
	@$(BIN)/orchestrator run jobs.vision:digits $(ARGS)

test: $(STAMP)  ## every test this machine can run (ARGS="-k resume")
	@$(BIN)/python helm/kube_tools.py || echo '==> the tests of the chart are skipped'
	@echo '==> pytest'
	@$(PYTEST) $(ARGS)

check: lint  ## the fast part: format, lint, types, layers, unit tests
	@echo '==> pytest (unit tests)'
	@$(PYTEST) -q -m '$(UNIT)' $(ARGS)

lint: $(STAMP)  ## check format, lint, types and layers; change nothing
	@echo '==> ruff format'
	@$(BIN)/ruff format --check --quiet --diff .
	@echo '==> ruff check'
	@$(BIN)/ruff check --quiet .
	@echo '==> mypy'
	@$(BIN)/mypy
	@echo '==> import-linter'
	@$(BIN)/lint-imports --no-logo

format: $(STAMP)  ## rewrite the sources the way lint wants them
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format .

chart-files: $(STAMP)  ## copy rules and dashboards into the chart, renew its table of values
	@$(BIN)/python helm/chart_files.py

kube-tools: $(STAMP)  ## put helm and kubectl into .venv, for the tests that need them
	@$(BIN)/python helm/kube_tools.py

clean:  ## remove .venv, builds and caches; runs/ and data/ stay
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find orchestrator jobs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	@echo 'clean: done'

# torch goes first and by itself: DeepSpeed is built from source, and everything else must settle on this torch.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is not Python 3.11 or newer ($$($(PYTHON) --version 2>&1))." >&2; \
	  echo "       Name one that is: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo '==> .venv: creating it with $(PYTHON)'
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "error: $(PYTHON) cannot create environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo '==> .venv: installing torch (the largest part)'
	@$(PIP) install --quiet --quiet --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	@echo '==> .venv: installing everything else'
	@$(PIP) install --quiet --quiet --constraint constraints.txt --editable '.[dev,cluster,kubernetes,edge]'
	@touch $@
	@echo '==> .venv: ready'
