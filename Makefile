PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint validity freezing clean

# torch first, pinned: see constraints.txt. The stamp keeps later calls quick.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[tensorboard]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed  ## Train a small decoder on three real text tasks and show where they interfere.
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-dev  ## Run the whole test suite.
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev  ## Check format, style, types and the direction of imports.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

validity: $(VENV)/.installed-dev  ## Compare every score with the measured rise of the loss; writes examples/validity.png.
	$(BIN)/python tests/benchmarks/validity.py

freezing: $(VENV)/.installed-dev  ## Train on one task, then on another with the worst cells frozen.
	$(BIN)/python tests/benchmarks/freezing.py

clean:
	rm -rf $(VENV) runs
