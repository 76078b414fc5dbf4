# `make tour` shows the package at work, `make test` tests it. Both need Python and make only:
# they build .venv on first use, and again when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV   ?= .venv
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
TRITON ?= .venv-triton
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip
INSTALL := $(PIP) install --quiet --constraint constraints.txt
# Tests call many small tensors: two processes of one thread beat one process of two threads.
PYTEST_ARGS ?= --numprocesses=2 --dist=worksteal
TOUR_ARGS   ?=
BENCH_ARGS  ?=
ATTACK_ARGS ?= --long

.PHONY: help tour tour-short test test-slow test-all test-triton test-pythons test-oldest test-newest lint format types docs bench gpu clean attack

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed 's/:.*## /\t/' | expand -t 14

tour: $(VENV)/.tour  ## train on real digits, write tour/report.html and tour/report.json
	$(BIN)/steadynorm tour $(TOUR_ARGS)

tour-short: $(VENV)/.tour  ## the same in seconds, with fewer steps and one seed
	$(BIN)/steadynorm tour --short $(TOUR_ARGS)

test: $(VENV)/.dev  ## the core and all that is fast, doctests included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not slow' $(PYTEST_ARGS)

test-slow: $(VENV)/.dev  ## the rest: the lab, the tour, three Keras backends, a browser, Inductor
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

test-all: test test-slow  ## both

test-triton: $(TRITON)/.done  ## the GPU kernels, interpreted and compiled for devices that are not here
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(TRITON)/bin/python -m pytest -q $(PYTEST_ARGS) \
	    tests/kernels/gpu
	OMP_NUM_THREADS=1 $(TRITON)/bin/python -m pytest -q tests/kernels/gpu/static_checks.py

test-pythons:  ## the wheel in empty environments of the oldest and the newest Python claimed
	tests/pythons.sh

test-oldest: constraints.txt  ## the layers on the oldest torch claimed; downloads up to 3 GB
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet 'torch==2.7.*' '.[torch]' pytest hypothesis expecttest
	OMP_NUM_THREADS=1 PYTHONPATH=src $(OLDEST)/bin/python -m pytest -q \
	    tests/statistics tests/nn/test_checkpointing.py tests/nn/test_edges.py \
	    tests/nn/test_gradients.py tests/nn/test_higher_derivatives.py tests/nn/test_names.py \
	    tests/nn/test_policies.py tests/nn/test_transforms.py \
	    tests/models/surgery/test_convert.py tests/models/test_other_tools.py

test-newest: constraints.txt  ## `make test` on the newest torch, else with the pins; downloads 3 GB
	$(PYTHON) -m venv $(NEWEST)
	grep -vE '^(torch|triton|setuptools)==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet --upgrade torch
	$(NEWEST)/bin/python -m pip install --quiet --constraint $(NEWEST)/constraints.txt '.[dev]'
	OMP_NUM_THREADS=1 PYTHONPATH=src $(NEWEST)/bin/python -m pytest -q -m 'not slow' $(PYTEST_ARGS)

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

gpu: $(VENV)/.dev  ## on a machine with a GPU: tests on it, compute-sanitizer, the bench, a page
	$(BIN)/python benchmarks/gpu.py $(BENCH_ARGS)

clean:  ## remove what these commands made
	rm -rf $(VENV) $(OLDEST) $(TRITON) site tour build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and alone: every later install then finds the pinned build in place, and a
# CPU build that this machine's package configuration offers is taken instead of the larger one.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	@touch $@

$(VENV)/.tour: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[torch,lab]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.tour

# Apart from .venv: TensorFlow and Triton each bring an LLVM, and one process may not bear both.
$(TRITON)/.done: constraints.txt pyproject.toml
	test -x $(TRITON)/bin/python || $(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(TRITON)/bin/python -m pip install --quiet --constraint constraints.txt \
	    --editable '.[torch]' triton pytest pytest-xdist
	@touch $@

attack: $(VENV)/.dev  ## break the promises of docs/promises.md, for at most 10 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attack $(ATTACK_ARGS)
