#!/usr/bin/env bash
# What only a machine with a GPU can tell, in stages of less than 8 minutes each:
#   benchmarks/on_gpu.sh STAGE FOLDER [--tiny]
#   a  the tests on the GPU, and compute-sanitizer over every operator
#   b  what the machine does at best, ten runs bit for bit, an example
#   c  comparisons with torch, torchvision and the classic algorithm
#   d  other constants of the kernels, the host's part of a call
# FOLDER receives the full results; each stage ends with a short table. --tiny tries the script out
# on a machine without a GPU, where the tests and the sanitizer are left out.
set -uo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[abcd]$ ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0"
  exit 2
fi
stage=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
tiny=${3:-}
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
failures=0

# run SECONDS NAME COMMAND...: the output goes to FOLDER/NAME.txt, its end to the screen
run() {
  local limit=$1 name=$2 started=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1
  local status=$?
  tail -n "${LINES_SHOWN:-12}" "$out/$name.txt"
  echo "-- $name: $([[ $status == 0 ]] && echo passed || echo "FAILED ($status)"), $((SECONDS - started)) s"
  [[ $status == 0 ]] || failures=$((failures + 1))
}

# bench SECONDS NAME MODULE [OPTION...]: the same for a benchmark, its records in FOLDER too
bench() {
  local limit=$1 name=$2 module=$3
  shift 3
  run "$limit" "$name" "$python" -m "benchmarks.$module" ${tiny:+$tiny} --output "$out/$name.jsonl" "$@"
}

command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.draw --format=csv
case $stage in
a)
  if [[ -n $tiny ]]; then
    echo "the tests and the sanitizer need the GPU"
  else
    DEFORMABLE_REQUIRE_GPU=1 run 260 tests "$python" -m pytest -q -p no:cacheprovider tests
    for tool in memcheck racecheck initcheck; do
      run 60 "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" -m benchmarks.device_checks --once
    done
  fi
  ;;
b)
  LINES_SHOWN=60 bench 240 microbench microbench
  LINES_SHOWN=80 run 120 same_bits "$python" -m benchmarks.device_checks ${tiny:+$tiny}
  [[ -n $tiny ]] || run 90 example "$python" examples/scaled_digits.py --device gpu --quick
  ;;
c)
  LINES_SHOWN=10 bench 240 deform_conv bench_deform_conv --rounds "${ROUNDS:-30}"
  LINES_SHOWN=10 bench 90 conv bench_conv --rounds "${ROUNDS:-20}"
  LINES_SHOWN=10 bench 130 roi bench_roi --rounds "${ROUNDS:-20}" --dtypes float32,float16
  ;;
d)
  LINES_SHOWN=100 bench 300 sweep sweep --rounds "${ROUNDS:-20}"
  run 60 host_cost "$python" -m benchmarks.host_cost ${tiny:+$tiny}
  ;;
esac
echo "stage $stage: $failures failed, $SECONDS s"
exit $((failures > 0))
