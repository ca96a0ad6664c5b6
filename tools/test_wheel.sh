#!/bin/sh
# test_wheel.sh VENV PYTHON TORCH: install the wheel from dist/ beside another torch and another Python, and run the suite there.
set -eu
venv=$1 python=$2 torch=$3
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
py=$(cd "$venv/bin" && pwd)/python
pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 "$py" -m pip --quiet "$@"; }
"$py" -c 'import torch' 2>/dev/null || pip install "torch==$torch"
"$py" -c 'import torch; print("torch==" + torch.__version__)' > "$venv/.genfast-constraints"
pip install --constraint "$venv/.genfast-constraints" pytest pytest-xdist numpy scipy matplotlib safetensors tqdm pillow tyro diffusers==0.42.0 transformers==5.23.0 torchsde==0.2.6
pip install --force-reinstall --no-deps dist/*.whl

# Beside the tests stands what they read, but not genfast/: the installed wheel is what is tested.
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
git ls-files tests benchmarks csrc docs examples pyproject.toml CMakeLists.txt README.md tools | xargs cp --parents -t "$dir"
cd "$dir"
"$py" -m genfast.info
"$py" -m pytest -m "not slow" --ignore tests/test_layers.py --ignore tests/test_build.py  # which look at the source tree
