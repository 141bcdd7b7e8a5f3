#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the CUDA and Triton tests, compute-sanitizer on a small case, a short benchmark.
#   PYTHON=python3 bench/gpu_check.sh [results.json]
# PYTHON must have a torch built with CUDA, and pytest. The libraries are built first where they are missing.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
results=${1:-bench/results/gpu.json}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PTKERNELS_STRICT=1
failed=()

step() {
  echo "== $1"
  shift
  "$@" || failed+=("$*")
}

"$PYTHON" -c 'import torch; torch.cuda.is_available() or exit(1); print(torch.__version__, torch.cuda.get_device_name())' ||
  {
    echo "no GPU that torch can use: nothing was run" >&2
    exit 2
  }
test -f ptkernels/lib/libptkernels_cuda.so || step build "$PYTHON" setup.py -q build_ext --inplace

step env "$PYTHON" -m ptkernels env
# Each architecture's kernels, whether or not they have passed before: ptkernels/_cuda.py holds what is known of them.
for arch in cuda_cores sm_80 sm_90a; do
  step "tests of $arch" env PTKERNELS_CUDA_ARCH=$arch \
    "$PYTHON" -m pytest -q -m cuda $(grep -rlE 'mark\.cuda' tests --include='test_*.py')
done
export PTKERNELS_CUDA_ARCH=sm_90a
if "$PYTHON" -c 'from ptkernels import _triton; reason = _triton.unavailable(); reason and exit(reason)'; then
  step triton "$PYTHON" -m pytest -q tests/triton
else
  echo "== Triton kernels are left out"
fi
step binary "$PYTHON" -m pytest -q tests/test_cuda_binary.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck initcheck; do
    # Without torch's cache every tensor is an allocation of its own, and reading past one is seen.
    step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" bench/gpu_small_case.py
  done
else
  echo "== compute-sanitizer is not installed: left out"
fi
step benchmark "$PYTHON" bench/gpu_bench.py --json "$results"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all passed"
