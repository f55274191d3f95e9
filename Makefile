PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test bench lint clean

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

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	touch $@

bench: $(VENV)/.installed-bench  ## Measure speed, memory and bytes, and print the table of the README.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/benchmarks

lint: $(VENV)/.installed-dev  ## Check format, style, types and the direction of imports.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) runs
