# `make demo` and `make test` set up everything they need in .venv (Python >= 3.10, make, a C compiler).
PYTHON ?= python3
PYTEST_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint format venv clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/.run ## run the demo and print the path of its report
	$(BIN)/mythos demo --out runs/demo

test: .venv/.dev ## run the whole test suite (PYTEST_ARGS="..." is passed on)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/.dev ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev ## mend style and format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: .venv/.dev ## set up .venv with all that tests and lint need

clean: ## remove caches and build output
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## the same, and .venv and runs as well
	rm -rf .venv runs

# Two stamps: the demo installs only what it runs with, the tests install every extra that they use.
.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "OpenMythos needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv

.venv/.run: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[report]'
	@$(BIN)/python -m open_mythos.kernels || true
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[report,data,hf,tensorboard,dev]'
	@$(BIN)/python -m open_mythos.kernels || true
	@touch .venv/.run $@
