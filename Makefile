# make demo     set up and sample pictures from the shipped model (out/demo.png)
# make test     set up and run the tests                    make test-fast     the same without the slow ones
# make lint     ruff and clang-format                       make typecheck     mypy
# make cuda     compile every .cu, fail on register spills  make audit         stable-ABI audit of the libraries
# make wheel    one py3-none wheel in dist/                 make wheel CPU=1   the same without CUDA kernels
# make bench    benchmarks, rows to benchmarks/results/     make test-wheel    the suite against another torch and another Python
# sh tools/gpu.sh OUT     everything that needs a GPU
# VENV=path uses that environment; a torch it already has is used as it is. GENFAST_CUDA=ON or OFF says whether CUDA kernels are compiled;
# by default they are where torch sees a GPU, for that GPU.

VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
# Tests run in as many processes. Threads that wait for work must not spin: they would keep the other process from its core.
JOBS ?= 2
PYTEST = OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(JOBS)

.PHONY: demo setup build dev test test-fast lint format typecheck cuda audit wheel test-wheel bench clean
.DELETE_ON_ERROR:

demo: setup
	@$(PY) -m genfast.demo --out out/demo.png

setup build:
	@$(PYTHON) tools/setup.py "$(VENV)"

dev:
	@$(PYTHON) tools/setup.py "$(VENV)" --dev

test: dev
	$(PYTEST)

test-fast: dev
	$(PYTEST) -m "not slow"

lint: dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files '*.h' '*.cuh' '*.cpp' '*.cu' | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	git ls-files '*.h' '*.cuh' '*.cpp' '*.cu' | xargs $(VENV)/bin/clang-format -i

typecheck: dev
	$(PY) -m mypy

cuda: dev
	$(PY) tools/check_cuda.py

audit: dev
	$(PY) tools/audit.py

wheel: setup
	CPU=$(CPU) sh tools/wheel.sh "$(VENV)"

# Needs python3.12 on PATH (or WHEEL_PYTHON=...) and downloads that torch once.
WHEEL_VENV ?= .venv-wheel
WHEEL_PYTHON ?= python3.12
WHEEL_TORCH ?= 2.11.0
test-wheel: wheel
	sh tools/test_wheel.sh "$(WHEEL_VENV)" "$(WHEEL_PYTHON)" "$(WHEEL_TORCH)"

bench: dev
	$(PY) -m benchmarks.run

clean:
	rm -rf build dist out $(VENV)/.genfast-setup.json
