# make run   installs everything and trains a federation of real data; make test runs every check; make docs builds
# the documentation into build/docs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: run test test-slow lint docs clean

run: $(VENV)/.simulation
	$(BIN)/flowerbed simulate grid=ray run.dir=runs/first run.overwrite=true

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.simulation: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[simulation,tracking,report]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[simulation,tracking,report,privacy,attacks,export,sparsity,sweeps,docs,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_generated src/*.egg-info
