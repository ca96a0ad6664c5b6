#!/bin/sh
# gpu.sh OUT [step ...]: on a machine with an NVIDIA GPU, nvcc and a CUDA build of torch, build, test and time. Needs no network.
# Steps, all by default: build test bench sanitize hopper. None takes ten minutes; one that fails or hangs stops no other. Logs and rows
# go to OUT as they come, verdicts to OUT/verdicts and the terminal. Where a command may take ten minutes: `build test`, `bench`,
# `sanitize`, `hopper`, one after the other.
#   GENFAST_GPU_WHEEL=FILE   use the libraries of this wheel (GENFAST_CUDA_ARCHS=90a-real make wheel, made ahead) instead of building
#   GENFAST_GPU_PACKAGES=DIR wheels to install besides, such as diffusers'
#   GENFAST_COMMIT=NAME      what rows say of the source where it came without its repository
set -u
out=$1
shift
[ $# -gt 0 ] || set -- build test bench sanitize hopper
mkdir -p "$out"
venv=${GENFAST_GPU_VENV:-/tmp/genfast-gpu}
py=$venv/bin/python
parent=$(python3 -c 'import sys; print(sys.executable)')
PATH=$(dirname "$parent"):$PATH:/usr/local/cuda/bin
export PATH PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
[ "$arch" = 90 ] && arch=90a
failed=0

step() { # step NAME SECONDS COMMAND...: its log to OUT, its verdict to the terminal
  name=$1 seconds=$2
  shift 2
  start=$(date +%s)
  timeout -k 10 "$seconds" "$@" > "$out/$name.log" 2>&1
  case $? in 0) verdict=ok ;; 124 | 137) verdict="FAILED, ended after $seconds s" failed=1 ;; *) verdict=FAILED failed=1 ;; esac
  echo "$name: $verdict in $(($(date +%s) - start)) s" | tee -a "$out/verdicts"
  tail -n 30 "$out/$name.log"
}

# What pytest has here: several processes, and an end for tests that hang.
with() { "$py" -c "import $1" 2> /dev/null && shift && printf "%s " "$@"; }

for what in "$@"; do
  case $what in
    build)
      # The packages of the environment that python3 belongs to, with genfast built for this GPU on top. Its pip serves; ensurepip may lack.
      "$parent" -m venv --without-pip "$venv"
      site=$("$py" -c 'import site; print(site.getsitepackages()[0])')
      "$parent" -c 'import site; print("\n".join(f"import site; site.addsitedir({p!r})" for p in site.getsitepackages()))' \
        > "$site/parent.pth"
      [ -z "${GENFAST_GPU_PACKAGES:-}" ] || step packages 120 "$py" -m pip install --no-index --no-deps "$GENFAST_GPU_PACKAGES"/*.whl
      if [ -n "${GENFAST_GPU_WHEEL:-}" ]; then
        step wheel 60 sh -c '"$0" -m zipfile -e "$1" "$2/from-wheel" && cp "$2"/from-wheel/genfast/*.so genfast/ && cp -r "$2"/from-wheel/*.dist-info "$2"' \
          "$py" "$GENFAST_GPU_WHEEL" "$site"
      else
        step build 570 "$py" -m pip install --no-build-isolation --no-deps --no-index --verbose --editable . \
          --config-settings=cmake.define.GENFAST_CUDA=ON --config-settings=cmake.define.GENFAST_CUDA_ARCHS="$arch-real" \
          --config-settings=build-dir=build/gpu
      fi
      step info 60 sh -c '"$0" -m genfast.info && nvidia-smi && "$0" -m pip list' "$py"
      ;;
    test)
      step test 570 "$py" -m pytest -m cuda --continue-on-collection-errors $(with xdist -n 4) $(with pytest_timeout --timeout 120 --timeout-method thread)
      ;;
    bench) step bench 570 "$py" -m benchmarks.run --device cuda --suite all --out "$out" ;;
    sanitize)
      for tool in memcheck racecheck synccheck; do
        for name in kernels attention attention_packed attention_tangent qknorm_rope specs gan_ops; do echo "sanitize:$tool:$name"; done
      done | xargs -P 7 -n 1 sh "$0" "$out" || failed=1
      ;;
    sanitize:*:*) # without torch's cache of memory, in which an address out of bounds is another tensor's
      name=${what##*:} tool=${what#*:}
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitize-${tool%:*}-$name" 180 compute-sanitizer --tool "${tool%:*}" --error-exitcode 9 \
        --kernel-name kns=genfast "$py" -m pytest -m cuda "tests/cuda/test_cuda_$name.py" \
        -k "not capture and not torch.float16 and not torch.float64"
      ;;
    hopper) # its verdicts as they come: a new kernel may hang
      [ "$arch" = 90a ] || { echo "hopper: got a GPU of sm_$arch, supported: sm_90"; continue; }
      "$py" -m tools.hopper "$out" 2>&1 | tee "$out/hopper.log"
      tail -n 1 "$out/hopper.log" | grep -q "^right: .*256\]; timed: .*256" || failed=1
      ;;
    *) echo "step: got $what, supported: build test bench sanitize hopper" && exit 2 ;;
  esac
done
exit $failed
