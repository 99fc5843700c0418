# make demo and make test need only Python >= 3.11 and make; both set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On Linux, MLX's wheel carries the reference BLAS; OpenBLAS is loaded ahead of it when it is there.
BLAS := . scripts/blas.sh;
PYTEST := $(BLAS) $(BIN)/python -m pytest
# One BLAS thread for each of the processes that share the cores, or they wait for each other.
PARALLEL := $(BLAS) OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: demo test test-stock test-reference test-slow lint bench setup clean

demo: $(VENV)/.installed
	@$(BLAS) $(BIN)/mlx-svd demo

test: $(VENV)/.installed-dev
	@$(PARALLEL)

test-stock: $(VENV)/.installed-dev
	@$(PARALLEL) -m stock

test-slow: $(VENV)/.installed-dev
	@$(PYTEST) -m slow

test-reference: $(VENV)/.installed-reference
	@$(PYTEST) -m reference

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: $(VENV)/.installed-reference
	@$(BLAS) $(BIN)/python -m benchmarks

setup: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mlx-svd needs Python >= 3.11; this is %s: make PYTHON=..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@

$(VENV)/.installed-reference: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --group reference
	@touch $@

clean:
	rm -rf $(VENV) out
