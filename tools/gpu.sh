#!/bin/sh
# gpu.sh OUT [step ...]: on a machine with an NVIDIA GPU, nvcc and a CUDA build of torch, build, test and time. Needs no network.
# Steps, all by default: build test sanitize bench hopper. Logs and rows go to OUT.
set -u
out=$1
shift
[ $# -gt 0 ] || set -- build test sanitize bench hopper
mkdir -p "$out"
venv=${GENFAST_GPU_VENV:-/tmp/genfast-gpu}
py=$venv/bin/python
status=0
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
[ "$arch" = 90 ] && arch=90a

step() { # step NAME COMMAND...: its log to OUT, its verdict to the terminal
  name=$1
  shift
  start=$(date +%s)
  if "$@" > "$out/$name.log" 2>&1; then verdict=ok; else verdict=FAILED status=1; fi
  echo "$name: $verdict in $(($(date +%s) - start)) s"
  tail -n 15 "$out/$name.log"
}

for what in "$@"; do
  case $what in
    build)
      # The packages of the environment that python3 belongs to, with genfast built for this GPU on top.
      python3 -m venv --system-site-packages "$venv"
      python3 -c 'import site; print("\n".join(site.getsitepackages()))' > "$("$py" -c 'import site; print(site.getsitepackages()[0])')/parent.pth"
      step build "$py" -m pip install --no-build-isolation --no-deps --no-index --editable . \
        --config-settings=cmake.define.GENFAST_CUDA=ON --config-settings=cmake.define.GENFAST_CUDA_ARCHS="$arch-real" \
        --config-settings=build-dir=build/gpu
      step info "$py" -m genfast.info
      ;;
    test) step test "$py" -m pytest -m cuda ;;
    sanitize)
      for tool in memcheck racecheck synccheck; do
        step "sanitize-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$py" -m pytest -m cuda tests/cuda -k "not capture"
      done
      ;;
    hopper)  # its verdicts as they come: a new kernel may hang
      [ "$arch" = 90a ] || { echo "hopper: got a GPU of sm_$arch, supported: sm_90"; continue; }
      "$py" -m tools.hopper "$out" 2>&1 | tee "$out/hopper.log"
      tail -n 1 "$out/hopper.log" | grep -q "^right: .*256\]; timed: .*256" || status=1
      ;;
    bench) step bench "$py" -m benchmarks.run --device cuda --suite all --out "$out" ;;
    *) echo "step: got $what, supported: build test sanitize bench hopper" && exit 2 ;;
  esac
done
exit $status
