# `make tour` shows the package at work, `make test` tests it. Both need Python and make only:
# they build .venv on first use, and again when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip
INSTALL := $(PIP) install --quiet --constraint constraints.txt
# Tests call many small tensors: two processes of one thread beat one process of two threads.
PYTEST_ARGS ?= --numprocesses=2 --dist=worksteal
TOUR_ARGS   ?=
BENCH_ARGS  ?=
ATTACK_ARGS ?= --long

.PHONY: help tour tour-short test lint format types docs bench clean attack

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed 's/:.*## /\t/' | expand -t 14

tour: $(VENV)/.tour  ## train on real digits, write tour/report.html and tour/report.json
	$(BIN)/steadynorm tour $(TOUR_ARGS)

tour-short: $(VENV)/.tour  ## the same in seconds, with fewer steps and one seed
	$(BIN)/steadynorm tour --short $(TOUR_ARGS)

test: $(VENV)/.dev  ## the whole test suite, doctests included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: $(VENV)/.dev  ## style and layout, nothing changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## style and layout, applied
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev  ## mypy --strict on src
	$(BIN)/mypy --strict src

docs: $(VENV)/.dev  ## the documentation, into site/; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.dev  ## speed against torch.nn and a plain copy, side by side in one run
	$(BIN)/steadynorm bench $(BENCH_ARGS)

clean:  ## remove what these commands made
	rm -rf $(VENV) site tour build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and alone: every later install then finds the pinned build in place, and a
# CPU build that this machine's package configuration offers is taken instead of the larger one.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	@touch $@

$(VENV)/.tour: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[lab]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.tour

attack: $(VENV)/.dev  ## break the promises of docs/promises.md, for at most 10 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attack $(ATTACK_ARGS)
