#!/bin/sh
# wheel.sh VENV: one py3-none wheel in dist/ that holds the two kernel libraries once and one small _C for every Python found. CPU=1 in the
# environment leaves the CUDA library out.
set -eu
py=$1/bin/python
bin=$(cd "$1/bin" && pwd)
export PATH="$bin:$PATH" CMAKE_GENERATOR=Ninja

own=$("$py" -c 'import sys; print(f"{sys.version_info.major}.{sys.version_info.minor}")')
others=""
for version in 3.11 3.12 3.13 3.14; do
  [ "$version" = "$own" ] && continue
  for candidate in "python$version" "$HOME"/.pyenv/versions/"$version".*/bin/python"$version"; do
    if "$candidate" -c 'import sysconfig, os, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2>/dev/null; then
      others="$others;$(command -v "$candidate")"
      break
    fi
  done
done

cuda=ON
[ -z "${CPU:-}" ] || cuda=OFF
archs="${GENFAST_CUDA_ARCHS:-75-real;80-real;86-real;89-real;90a-real;100-real;120}"
rm -rf dist
"$py" -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps --wheel-dir dist . \
  --config-settings=wheel.py-api=py3 \
  --config-settings=build-dir=build/wheel$([ $cuda = ON ] || echo -cpu) \
  --config-settings=cmake.define.GENFAST_CUDA=$cuda \
  --config-settings=cmake.define.GENFAST_CUDA_ARCHS="$archs" \
  --config-settings=cmake.define.GENFAST_PYTHONS="${others#;}"
"$py" - <<'PYTHON'
import pathlib, zipfile
for wheel in pathlib.Path("dist").glob("*.whl"):
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB")
    names = zipfile.ZipFile(wheel).namelist()
    if "genfast/libgenfast_cuda.so" not in names:
        print("this wheel has CPU kernels only")
    for item in zipfile.ZipFile(wheel).infolist():
        if item.filename.endswith((".so", ".safetensors")):
            print(f"  {item.filename}: {item.file_size / 2**20:.2f} MiB")
PYTHON
