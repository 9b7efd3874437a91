#!/usr/bin/env bash
# Builds the CUDA kernels, runs the tests, compute-sanitizer and the benchmarks on the GPU of this machine, and writes
# one JSON that scripts/record_check.py can merge into igpo/ops/checked.json.
#
#   scripts/gpu_check.sh                     build, test, sanitize, bench, suite: about 14 minutes at most
#   scripts/gpu_check.sh build test          some of them; record_check.py takes the JSONs of several calls
#   OUT=DIR                                  where logs and the JSON go (default: benchmarks/results)
#   BUILD_S, TEST_S, SANITIZE_S, BENCH_S, SUITE_S   seconds each stage may take
#   BENCH_ARGS, TEST_ARGS                    further arguments of benchmarks/run.py (default --quick) and of pytest
#   PYTHON                                   the interpreter (default: .venv/bin/python if there, else python3)
#   IGPO_COMMIT                              names the commit for a copy without .git
#
# A stage that fails or runs out of time does not stop the next; the exit status says whether one did. No network is
# used: torch, pytest and what the build needs must be there. Without torch, `make test` sets up a .venv first.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
declare -A LIMIT=(
  [build]=${BUILD_S:-130} [test]=${TEST_S:-190} [sanitize]=${SANITIZE_S:-180} [bench]=${BENCH_S:-270} [suite]=${SUITE_S:-60}
)
STAGES=("$@")
[ ${#STAGES[@]} -gt 0 ] || STAGES=(build test sanitize bench suite)
export PYTHONUNBUFFERED=1 IGPO_TEST_DEVICE=cuda

die() {
  echo "gpu_check: $1" >&2
  exit 2
}

# within SECONDS COMMAND...: interrupts it when they are over, so that it can still write what it knows
within() {
  timeout --signal=INT --kill-after=15 "$@"
}

# parallel pytest where pytest-xdist is there
workers() {
  "$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n ${WORKERS:-8}"
}

build() {
  local arch
  arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return 1
  IGPO_BUILD=cuda IGPO_CUDA_ARCHS=${IGPO_CUDA_ARCHS:-$arch} within "${LIMIT[build]}" \
    "$PYTHON" -m pip install -v --no-build-isolation --no-deps --no-index -e . || return $?
  "$PYTHON" -m igpo.ops
}

# the tests of the ops, on every backend that runs here
test_ops() {
  local args
  read -ra args <<<"$(workers) ${TEST_ARGS:-}"
  OMP_NUM_THREADS=1 within "${LIMIT[test]}" "$PYTHON" -m pytest tests/ops "${args[@]}" --junitxml="$OUT/junit.xml" -rf
}

# everything else
suite() {
  local args
  read -ra args <<<"$(workers) ${TEST_ARGS:-}"
  OMP_NUM_THREADS=1 within "${LIMIT[suite]}" "$PYTHON" -m pytest tests --ignore=tests/ops "${args[@]}" -rf
}

# memcheck with the caching allocator off, so that each tensor has bounds of its own; racecheck for shared memory
sanitize() {
  local tool backend status failed=0 share=$((LIMIT[sanitize] / 4)) sanitizer
  sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  for backend in cuda triton; do
    for tool in memcheck racecheck; do
      echo "== $tool, $backend"
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 within "$share" \
        "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
        "$PYTHON" scripts/sanitize_ops.py --backend "$backend"
      status=$?
      printf 'sanitize:%s:%s\t%s\t0\n' "$tool" "$backend" "$status" >>"$OUT/stages.tsv"
      [ "$status" -eq 0 ] || failed=1
    done
  done
  return "$failed"
}

bench() {
  local args
  read -ra args <<<"${BENCH_ARGS:---quick}"
  # the last seconds are for what an op has begun when the budget ends
  within "${LIMIT[bench]}" "$PYTHON" benchmarks/run.py "${args[@]}" \
    --budget $((LIMIT[bench] * 4 / 5)) --output "$OUT/bench.json"
}

for stage in "${STAGES[@]}"; do
  [ -n "${LIMIT[$stage]:-}" ] || die "no stage '$stage'; there are: build test sanitize bench suite"
done
"$PYTHON" -c 'import torch' 2>/dev/null || die "$PYTHON has no torch; run \`make test\` once, or set PYTHON"
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || die "torch sees no GPU"
mkdir -p "$OUT" || die "cannot write to $OUT"
OUT=$(cd "$OUT" && pwd)
: >"$OUT/stages.tsv"

for stage in "${STAGES[@]}"; do
  echo "== $stage (at most ${LIMIT[$stage]} s): $OUT/$stage.log"
  begin=$SECONDS
  case $stage in
    build) build ;;
    test) test_ops ;;
    sanitize) sanitize ;;
    bench) bench ;;
    suite) suite ;;
  esac >"$OUT/$stage.log" 2>&1
  status=$?
  printf '%s\t%s\t%s\n' "$stage" "$status" "$((SECONDS - begin))" >>"$OUT/stages.tsv"
  [ "$status" -eq 0 ] || tail -n 25 "$OUT/$stage.log"
done
exec "$PYTHON" scripts/gpu_report.py "$OUT"
