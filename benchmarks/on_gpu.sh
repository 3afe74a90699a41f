#!/usr/bin/env bash
# What only a machine with a GPU can tell, in stages of less than 8 minutes each:
#   benchmarks/on_gpu.sh STAGE FOLDER [--tiny]
#   a  the tests on the GPU, and compute-sanitizer over every operator
#   b  what the machine does at best, ten runs bit for bit, an example
#   c  deformable convolutions beside torch and torchvision
#   d  plain convolutions, and RoI operators beside the classic algorithm, too
#   e  other constants of the kernels, the host's part of a call
# FOLDER receives the full results; each stage ends with a short table. What runs out of its time is
# interrupted, and prints what it has until then. --tiny tries the script out on a machine without a
# GPU, where the tests and the sanitizer are left out.
set -uo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[abcde]$ ]]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0"
  exit 2
fi
stage=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
tiny=${3:-}
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
PATH+=:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer
python=${PYTHON:-python3}
failures=0

# run SECONDS NAME COMMAND...: the output goes to FOLDER/NAME.txt, its end to the screen
run() {
  local limit=$1 name=$2 started=$SECONDS
  shift 2
  echo "== $name"
  timeout --signal=INT --kill-after=15 "$limit" "$@" >"$out/$name.txt" 2>&1
  local status=$?
  tail -n "${LINES_SHOWN:-12}" "$out/$name.txt"
  echo "-- $name: $([[ $status == 0 ]] && echo passed || echo "FAILED ($status)"), $((SECONDS - started)) s"
  [[ $status == 0 ]] || failures=$((failures + 1))
  return "$status"
}

# bench SECONDS NAME MODULE [OPTION...]: the same for a benchmark, its records in FOLDER too
bench() {
  local limit=$1 name=$2 module=$3
  shift 3
  run "$limit" "$name" "$python" -m "benchmarks.$module" ${tiny:+$tiny} --output "$out/$name.jsonl" "$@"
}

# together: waits for what was started in the background, whose failures it counts
together() {
  local job
  for job in $(jobs -p); do
    wait "$job" || failures=$((failures + 1))
  done
}

has() { "$python" -c "import $1" 2>/dev/null; }

# Nearly all of the time goes into compiling kernels: processes share what they have compiled. Where
# the environment is not the one that the tests were made in, a warning is not an error.
tests() {
  local options=(-q --tb=short --durations=10 -p no:cacheprovider -p no:benchmark -W default)
  has xdist && options+=(-n 12)
  has pytest_timeout && options+=(--timeout=120 --timeout-method=thread)
  OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 DEFORMABLE_REQUIRE_GPU=1 LINES_SHOWN=40 \
    run 240 tests "$python" -m pytest "${options[@]}" --ignore-glob='tests/test_simt*' tests
  true  # whatever they say
}

# Every operator once, which tells first whether anything works at all.
once() {
  local dtype
  for dtype in float32 tf32 float16 bfloat16; do
    run 70 "once_$dtype" "$python" -m benchmarks.device_checks --once --dtypes "$dtype" &
  done
  together
  [[ $failures -lt 4 ]]
}

# What it launches `once` has compiled.
sanitizer() {
  local tool options
  for tool in memcheck racecheck initcheck; do
    options=(--tool "$tool" --error-exitcode 9)
    # cupy asks for attributes that a device may not have, which is no error of a kernel
    [[ $tool == memcheck ]] && options+=(--report-api-errors no)
    run 145 "$tool" compute-sanitizer "${options[@]}" "$python" -m benchmarks.device_checks --once &
  done
  together
}

if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.draw --format=csv
  "$python" -c 'import cupy; cupy.show_config()' | grep -E 'CuPy Version|CUDA Driver|NVRTC|cuBLAS'
fi
case $stage in
a)
  if [[ -n $tiny ]]; then
    echo "the tests and the sanitizer need the GPU"
  else
    once && tests && sanitizer
  fi
  ;;
b)
  LINES_SHOWN=60 bench 150 microbench microbench
  LINES_SHOWN=80 run 220 same_bits "$python" -m benchmarks.device_checks ${tiny:+$tiny}
  [[ -n $tiny ]] || run 90 example "$python" examples/scaled_digits.py --device gpu --quick
  ;;
c)
  LINES_SHOWN=130 bench 460 deform_conv bench_deform_conv --rounds "${ROUNDS:-30}"
  ;;
d)
  LINES_SHOWN=100 bench 200 conv bench_conv --rounds "${ROUNDS:-20}" --dtypes float32,tf32,float16
  LINES_SHOWN=90 bench 260 roi bench_roi --rounds "${ROUNDS:-20}" --dtypes float32,float16
  ;;
e)
  LINES_SHOWN=300 bench 360 sweep sweep --rounds "${ROUNDS:-20}"
  run 60 host_cost "$python" -m benchmarks.host_cost ${tiny:+$tiny}
  ;;
esac
echo "stage $stage: $failures failed, $SECONDS s"
exit $((failures > 0))
