#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than nine minutes, or in slices of it:
#   bench/gpu_check.sh [--out FOLDER] [env cuda triton sanitizer attention rotary_embedding conv_bn_relu quantized_matmul
#     packed_rnn]
# PYTHON must have a torch >= 2.10 built with CUDA, and pytest. Works from a copied tree without a network; the libraries
# are built first where they are missing.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
out=bench/results
if [ "${1:-}" = --out ]; then
  out=$2
  shift 2
fi
slices=("$@")
[ ${#slices[@]} -gt 0 ] || slices=(env cuda triton sanitizer attention rotary_embedding conv_bn_relu quantized_matmul packed_rnn)
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PTKERNELS_STRICT=1
mkdir -p "$out"
failed=()
large="beyond_31_bits or to_31_elements"

step() {
  local name=$1 limit=$2 begun=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" || failed+=("$name: $*")
  echo "== $name took $((SECONDS - begun)) s"
}

# Compiling kernels is most of what the tests do: processes side by side, where pytest has xdist.
pytest() {
  local workers=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  step "$1" "$2" "$PYTHON" -m pytest -q -p no:cacheprovider "${workers[@]}" "${@:3}"
}

"$PYTHON" -c 'import torch; torch.cuda.is_available() or exit(1); print(torch.__version__, torch.cuda.get_device_name())' ||
  {
    echo "no GPU that torch can use: nothing was run" >&2
    exit 2
  }
test -f ptkernels/lib/libptkernels.so || step build 600 "$PYTHON" setup.py -q build_ext --inplace

for slice in "${slices[@]}"; do
  case $slice in
  env) step env 60 "$PYTHON" -m ptkernels env ;;
  cuda)
    # Each architecture's kernels, whether or not they have passed before: ptkernels/_cuda.py holds what is known of them.
    for arch in cuda_cores sm_80 sm_90a; do
      files=$(grep -rlE 'mark\.cuda' tests --include='test_*.py')
      PTKERNELS_CUDA_ARCH=$arch pytest "cuda, $arch" 90 -m cuda -k "not ($large)" $files
      # One after the other: each takes most of the GPU's memory.
      PTKERNELS_CUDA_ARCH=$arch step "large, $arch" 60 "$PYTHON" -m pytest -q -p no:cacheprovider -m cuda -k "$large" $files
    done
    pytest binary 60 tests/test_cuda_binary.py
    ;;
  triton)
    if "$PYTHON" -c 'from ptkernels import _triton; reason = _triton.unavailable(); reason and exit(reason)'; then
      pytest triton 240 tests/triton
    else
      echo "== Triton kernels are left out"
    fi
    ;;
  sanitizer)
    if command -v compute-sanitizer >/dev/null; then
      for tool in memcheck racecheck synccheck initcheck; do
        # Without torch's cache every tensor is an allocation of its own, and reading past one is seen.
        step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 PTKERNELS_CUDA_ARCH=sm_90a \
          compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" bench/gpu_small_case.py
      done
    else
      echo "== compute-sanitizer is not installed: left out"
    fi
    ;;
  *) step "benchmark of $slice" 150 env PTKERNELS_CUDA_ARCH=sm_90a "$PYTHON" bench/gpu_bench.py --op "$slice" --out "$out" --seconds 60 ;;
  esac
done

if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all passed"
