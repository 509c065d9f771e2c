# make test and make demo work from a fresh clone on a machine with Python >= 3.10 and nothing else.

PYTHON  ?= python3
TORCH   ?= torch==2.13.0
WORKERS ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
BROKEN  := $(VENV)/.unfinished
PIP     := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help setup test test-all lint demo clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## make the environment .venv (every other target does it when needed)

# .ready is touched last, and .unfinished stands from the first step on: what an interruption leaves is made anew.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("mmmamba needs Python >= 3.10, and $(PYTHON) is " + sys.version.split()[0] + "; name another with PYTHON=..." if sys.version_info < (3, 10) else 0)'
	@if [ -e $(BROKEN) ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(BROKEN)
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@if ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
		echo "installing $(TORCH) (once; a few minutes)"; $(PIP) install $(TORCH); fi
	@echo "installing mmmamba and its tools"
	@$(PIP) install -e '.[dev,demo]'
	@rm -f $(BROKEN) && touch $(READY)

PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term --cov-fail-under=90

test: lint  ## lint, type-check and run the tests, with coverage
	$(PYTEST) -m "not slow" $(ARGS)

test-all: lint  ## the same, and the tests that take long and rarely break (marked slow)
	@$(PIP) install -e '.[dev,demo,test-all]' || echo "not all was installed: what needs it is skipped"
	$(PYTEST) $(ARGS)

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/mypy

demo: $(READY)  ## the whole story in small, on the CPU: mmmamba demo
	$(BIN)/mmmamba demo $(ARGS)

clean:  ## remove the environment and every cache
	rm -rf $(VENV) .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
