# make demo     set up and sample pictures from the shipped model (out/demo.png)
# make test     set up and run the tests                    make test-fast     the same without the slow ones
# make lint     ruff and clang-format                       make typecheck     mypy
# make cuda     compile every .cu, fail on register spills  make audit         stable-ABI audit of the libraries
# make wheel    one py3-none wheel in dist/                 make test-wheel    the suite against another torch and another Python
# make bench    benchmarks, rows to benchmarks/results/       sh tools/gpu.sh OUT     everything that needs a GPU
# VENV=path uses that environment; a torch it already has is used as it is.

VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
# What the compiled half depends on: when one of these changes, the next target rebuilds (incrementally).
NATIVE = pyproject.toml CMakeLists.txt $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
READY = $(VENV)/.genfast-ready

.PHONY: demo setup build test test-fast lint format typecheck cuda audit wheel test-wheel bench clean
.DELETE_ON_ERROR:

demo: setup
	$(PY) -m genfast.demo --out out/demo.png

setup build: $(READY)

$(READY): $(NATIVE) tools/setup.sh
	sh tools/setup.sh "$(VENV)" "$(PYTHON)"
	touch $@

test: setup
	$(PY) -m pytest

test-fast: setup
	$(PY) -m pytest -m "not slow"

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files '*.h' '*.cuh' '*.cpp' '*.cu' | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	git ls-files '*.h' '*.cuh' '*.cpp' '*.cu' | xargs $(VENV)/bin/clang-format -i

typecheck: setup
	$(PY) -m mypy

cuda: setup
	$(PY) tools/check_cuda.py

audit: setup
	$(PY) tools/audit.py

wheel: setup
	sh tools/wheel.sh "$(VENV)"

# Needs python3.12 on PATH (or WHEEL_PYTHON=...) and downloads that torch once.
WHEEL_VENV ?= .venv-wheel
WHEEL_PYTHON ?= python3.12
WHEEL_TORCH ?= 2.11.0
test-wheel: wheel
	sh tools/test_wheel.sh "$(WHEEL_VENV)" "$(WHEEL_PYTHON)" "$(WHEEL_TORCH)"

bench: setup
	$(PY) -m benchmarks.run

clean:
	rm -rf build dist out $(READY)
