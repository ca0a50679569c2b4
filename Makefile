# Two commands: `make quickstart` and `make test`; each sets up the environment first, with nothing but Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup quickstart test lint docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

quickstart: setup
	$(BIN)/patchad fit --config quickstart --trainer.logger.version quickstart
	$(BIN)/patchad test --ckpt_path runs/quickstart/checkpoints/last.ckpt --trainer.logger.version quickstart-test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: setup
	$(BIN)/sphinx-build -W -q -b html docs docs/_build/html

test: lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

clean:
	rm -rf $(VENV) build docs/_build *.egg-info
