# Needs Python >= 3.10 with venv, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test test-all timm-tests check build

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

quickstart: install  ## train a dynamic network and its static twin on real digits, compare, save, load back, draw
	$(BIN)/python train_scripts/quickstart.py

test: install check  ## everything CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: install check  ## with the whole zoo, trainings and the wheel in an empty environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow or not slow"
	$(BIN)/python tests/kill_and_resume.py
	$(BIN)/python tests/timm_suite/run.py

timm-tests: install  ## timm's own tests/test_models.py, unedited, on every dg_* model
	$(BIN)/python tests/timm_suite/run.py

check: install  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

build: install
	$(BIN)/python -m build
