# Everything here needs Python 3.11 to 3.13 and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What is installed is compiled once, when it is first imported, and not by each process anew (3 s for torch).
unexport PYTHONDONTWRITEBYTECODE
# Each process of the tests has a core to itself.
ALONE := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: demo test quick coverage check docs bench wheel audit clean

# The main job: fit a bundled data set, print the table, write the report.
demo: $(READY)
	$(BIN)/openreml-nn

test: $(READY)
	$(ALONE) $(BIN)/python -m pytest -n auto --dist worksteal -q

# Those that take a moment.
quick: $(READY)
	$(ALONE) $(BIN)/python -m pytest -n auto --dist worksteal -q -m "not slow and not fuzz"

# The lines of the package that no test runs.
coverage: $(READY)
	$(BIN)/python -m pip install --quiet 'coverage>=7.10'
	$(BIN)/coverage erase
	$(ALONE) $(BIN)/coverage run -m pytest -n auto --dist worksteal -q
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# What CI runs besides the tests.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	rm -rf docs/api  # pages of what is gone
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: $(READY)
	$(BIN)/python -m tests.benchmarks
	$(BIN)/python -m tests.benchmarks.kernels
	$(BIN)/python -m tests.benchmarks.algebra
	$(BIN)/python -m tests.benchmarks.sparse
	$(BIN)/python -m tests.benchmarks.growth
	$(BIN)/python -m tests.benchmarks.training
	$(BIN)/python -m tests.benchmarks.responses
	$(BIN)/python -m tests.benchmarks.neural
	$(BIN)/python -m tests.benchmarks.devices

# The distributions, and the wheel alone in an environment of its own: it fits, predicts, reports and is typed.
wheel: $(READY)
	rm -rf dist build
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv build/alone
	build/alone/bin/python -m pip install --quiet --no-compile -c constraints.txt dist/*.whl
	cp tests/downstream.py build/
	cd build && alone/bin/openreml-nn hydra.run.dir=run
	cd build && alone/bin/openreml-nn predict checkpoint=run/model.ckpt hydra.run.dir=run \
	    data.path=$(CURDIR)/openreml_nn/datasets/sleepstudy.csv
	cd build && alone/bin/openreml-nn report path=run
	cd build && alone/bin/python -c "from downstream import *; tables(); trees(); networks(); mistakes()"
	cd build && $(abspath $(BIN))/mypy --strict --config-file= --ignore-missing-imports \
	    --python-executable alone/bin/python downstream.py

# Known vulnerabilities of what is pinned.
audit: $(READY)
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps

clean:
	rm -rf $(VENV) build dist outputs multirun docs/_build docs/_generated docs/api

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev,docs]"
	touch $@
