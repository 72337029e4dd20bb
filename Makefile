# Needs Python >= 3.11 with venv, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests that ask for two threads share two cores with the other worker: who waits should sleep, not spin
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

.PHONY: install quickstart test suite test-all timm-tests test-floor test-newest check api docs build

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -e '.[dev]'  # Python compiles what is imported
	touch $@

quickstart: install  ## train a dynamic network and its static network on real digits, compare, save, load back, draw
	$(BIN)/python train_scripts/quickstart.py

test: install  ## everything CI runs: `check` beside the suite
	$(MAKE) --jobs 2 check suite

suite: install
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal

test-all: install check $(VENV)/.docs  ## with the whole zoo, trainings, the site, and the wheel in an empty environment
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow"
	$(BIN)/python -m tests.training.kill_and_resume
	$(BIN)/python -m tests.timm_suite.run

timm-tests: install  ## timm's own tests/test_models.py, unedited, on every dg_* model
	$(BIN)/python -m tests.timm_suite.run

test-floor: install  ## the contract tests with the oldest releases that pyproject.toml claims, in a new environment
	$(BIN)/python -m tests.package.versions floor

test-newest: install  ## the contract tests with the newest releases, in a new environment
	$(BIN)/python -m tests.package.versions newest

check: install  ## format, lint, types, directions of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

api: install  ## accept the public API as it is now: rewrites tests/package/public_api.json
	$(BIN)/python -m tests.package.api

docs: $(VENV)/.docs  ## the site, in output/site
	$(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	touch $@

build: install
	$(BIN)/python -m build
