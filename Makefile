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
.PHONY: help setup test test-all lint demo docs dist clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## make the environment .venv (every other target does it when needed)

# .unfinished is there from the first step on, and .ready is written last: after an interruption all is made again.
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

test: lint  ## lint, then run the tests, with coverage
	$(PYTEST) -m "not slow" $(ARGS)

test-all: lint  ## the same, with the tests that take long and rarely break (marked slow)
	@$(PIP) install -e '.[dev,demo,docs,test-all]' || echo "not all was installed: what needs it is skipped"
	$(PYTEST) $(ARGS)

lint: $(READY)  ## check the style, the format and the types, with ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

demo: $(READY)  ## run the whole method in small, on the CPU: mmmamba demo
	$(BIN)/mmmamba demo $(ARGS)

docs: $(READY)  ## build the documentation and the API reference into site/
	@$(BIN)/python -c 'import material, mkdocstrings_handlers' 2>/dev/null || $(PIP) install -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(READY)  ## build the wheel and the sdist into dist/, and chat from the wheel in a fresh environment
	@$(BIN)/python -c 'import build' 2>/dev/null || $(PIP) install -e '.[dist]'
	$(BIN)/python scripts/dist.py --torch "$(TORCH)" $(ARGS)

clean:  ## remove the environment, every cache and everything that was built
	rm -rf $(VENV) .coverage .coverage.* htmlcov coverage.xml .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf build dist site src/*.egg-info
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
