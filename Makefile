# Needs GNU make and Python >= 3.11 with pip and venv; everything else goes into $(VENV).
#   make test PYTHON=python3.12 VENV=.venv-3.12      another interpreter, its own environment
#   make test ARGS='-k kernels -x'                   more arguments for the command

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
DATA ?= mnist

BIN := $(VENV)/bin

# These need no display. (The docs are left out: their notebooks draw inline.)
example test test-unit test-slow bench images papers suite: export MPLBACKEND ?= Agg
# LAPACK's matrices are small here: its threads would wait for each other, a hundred times as long where cores are busy.
# (Tests and the suite say so themselves: tests/conftest.py, benchmarks/suite.)
example docs bench images papers: export OPENBLAS_NUM_THREADS ?= 1
# What was compiled once is read the next time. (Benchmarks time it, so they have no such cache.)
example docs: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
example docs: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0

.DEFAULT_GOAL := help
.PHONY: help example test test-unit test-slow lint format docs bench images papers suite clean

help: ## Show this help
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(firstword $(MAKEFILE_LIST)) \
		| awk -F'|' '{ printf "  make %-10s %s\n", $$1, $$2 }'

example: $(VENV)/.installed-examples ## Fit and plot the rotated Swiss roll, in two to three minutes (ARGS=--quick: one)
	$(BIN)/python examples/rotated_swiss_roll.py $(ARGS)

test: $(VENV)/.installed-test ## Run the tests and doctests, in two processes (JOBS=2)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-unit: $(VENV)/.installed-test ## Run the tests that fit nothing, in a minute
	$(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile -m 'unit and not slow' $(ARGS)

test-slow: $(VENV)/.installed-test ## Run only the slow tests
	$(BIN)/python -m pytest -n $(JOBS) -m slow $(ARGS)

lint: $(VENV)/.installed-dev ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## Apply what `make lint` can fix by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs ## Build the docs into docs/_build/html, and check the pages; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -j $(JOBS) -b html docs docs/_build/html $(ARGS)
	$(BIN)/python -m pytest docs/test_pages.py -q

bench: $(VENV)/.installed-examples ## Run the speed benchmarks
	$(BIN)/python -m benchmarks.speed $(ARGS)

papers: $(VENV)/.installed-examples ## Run the papers' experiments in reduced form (about 15 minutes)
	$(BIN)/python -m benchmarks.papers all $(ARGS)

images: $(VENV)/.installed-examples ## Train image models for equal times (DATA_DIR=folder with the files, DATA=mnist; 45 minutes)
	@test -n "$(DATA_DIR)" || { echo 'Say where the images are: make images DATA_DIR=... (files: benchmarks/images/data.py)' >&2; exit 1; }
	$(BIN)/python -m benchmarks.images $(DATA) --data-dir $(DATA_DIR) $(ARGS)

suite: $(VENV)/.installed-examples ## Fit models whose optimum is known, with the defaults, in two processes (JOBS=2)
	$(BIN)/python -m benchmarks.suite --jobs $(JOBS) $(ARGS)

clean: ## Remove .venv (VENV), caches and built files
	rm -rf $(VENV) docs/_build docs/api docs/gallery build dist .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name '.venv*' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp .installed-X says that extra X is installed, as pyproject.toml has it now.
$(VENV)/.installed-%: pyproject.toml | $(VENV)/.created
	@echo "installing numpyro_ebipla[$*] and what it needs into $(VENV): some 400 MB, one to two minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python >= 3.11 is needed: call make with PYTHON=/path/to/python3.x' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
