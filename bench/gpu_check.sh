#!/usr/bin/env bash
# All checks and measurements of hetis on one GPU, in at most eight minutes, on a machine without network.
#
#     OUT=results WHEELS=wheels bash bench/gpu_check.sh [PHASE ...]
#
# Phases run in order of importance. Each has a time limit and appends one JSON line (GPU, driver, versions, date,
# outcome, figures) to $OUT/gpu_check.jsonl; a table ends the run. All output is in $OUT/gpu_check.log. Without a GPU,
# phases that need none run on the CPU with a tiny model, and the others are reported as "needs a GPU".
#
# WHEELS: a folder with wheels of packages that the machine lacks (msgspec, pyzmq). PYTHON: the interpreter (python3).
# Needs torch, triton, transformers, pytest, a C++ compiler and the headers of Python; uses pytest-xdist (parallel
# tests), pytest-timeout and compute-sanitizer if they are installed.
set -uo pipefail
cd "$(dirname "$0")/.."

TOTAL_SECONDS=480
LOG_BYTES=2000000  # of each phase
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-bench/results/gpu_check}")
SITE=$(mktemp -d)
CHECK="$PYTHON bench/gpu/report.py"
LOG=$OUT/gpu_check.log
mkdir -p "$OUT" || exit 1
trap 'rm -rf "$SITE"; kill "${BUILD:-}" 2>/dev/null' EXIT

if [ -n "${WHEELS:-}" ]; then
    $PYTHON -m pip install --quiet --no-index --no-deps --no-cache-dir --target "$SITE" "$WHEELS"/*.whl || exit 1
fi
ln -s "$PWD/kernels" "$SITE/hetis_kernels"
export PYTHONPATH=$SITE:$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OUT
[ -w "${HOME:-/nowhere}" ] || export TRITON_CACHE_DIR=$SITE/triton
GPU=$($PYTHON -c 'import torch; print(int(torch.cuda.is_available()))') || exit 1
DEVICE=$([ "$GPU" = 1 ] && echo cuda || echo cpu)
[ "$GPU" = 1 ] && export TRITON_INTERPRET=0

# Arguments: name, limit in seconds, requirement (any, gpu, or a program that needs a GPU), command. At the limit the
# command is interrupted, then killed.
phase() {
    local name=$1 limit=$2 needs=$3 begin=$SECONDS outcome
    shift 3
    [ -z "$WANTED" ] || [[ " machine $WANTED " == *" $name "* ]] || return 0
    local left=$((TOTAL_SECONDS - SECONDS))
    if [ "$needs" != any ] && [ "$GPU" = 0 ]; then
        outcome="needs a GPU"
    elif [ "$needs" != any ] && [ "$needs" != gpu ] && ! command -v "$needs" >/dev/null; then
        outcome="needs $needs"
    elif [ $left -lt 5 ]; then
        outcome="no time left"
    else
        echo "== $name" | tee -a "$LOG"
        timeout --signal=INT --kill-after=10 $((limit < left ? limit : left)) "$@" 2>&1 |
            tee "$OUT/phase.log" | tail -n 25
        case ${PIPESTATUS[0]} in
            0) outcome=ok ;;
            124 | 137) outcome="over $limit s" ;;
            *) outcome=failed ;;
        esac
        tail -c $LOG_BYTES "$OUT/phase.log" >>"$LOG"
    fi
    $CHECK add "$OUT" "$name" "$outcome" $((SECONDS - begin))
    rm -f "$OUT/phase.log"
}

# Arguments: processes, folders. Prints the command that runs their GPU tests, each process on one core; a file that
# cannot be collected does not stop the others.
tests() {
    local processes=$1
    shift
    echo env OMP_NUM_THREADS=1 $PYTHON -m pytest -m gpu -p no:cacheprovider --tb=short --durations=5 \
        --continue-on-collection-errors $(has pytest_timeout && echo --timeout 60) \
        $(has xdist && echo --numprocesses "$processes") "$@"
}
has() { $PYTHON -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

WANTED=$*
export PATH=$PATH:/usr/local/cuda/bin
timeout 200 $PYTHON setup.py --quiet build_ext --inplace >"$OUT/build.log" 2>&1 & BUILD=$!
phase machine 30 any $CHECK machine "$OUT"
phase kernels 100 gpu $(tests 12 tests/kernels)  # which need no C++ extension
wait $BUILD
BUILD=
phase extensions 20 any $CHECK extensions
phase ranks 50 gpu $(tests 8 tests/ranks tests/comm)
phase fleets 110 gpu $(tests 8 tests/engine)
phase generate 60 any $PYTHON bench/gpu/generate.py --device $DEVICE
phase decode 75 any $PYTHON bench/gpu/decode.py --device $DEVICE
phase bandwidth 55 gpu $PYTHON bench/bench_kernels.py --output "$OUT/kernels.jsonl"
phase throughput 70 any $PYTHON bench/gpu/throughput.py --device $DEVICE
phase links 40 any $PYTHON bench/bench_links.py --kinds shm --device $DEVICE --json "$OUT/links.json"
phase sanitizer 45 compute-sanitizer compute-sanitizer --tool racecheck --error-exitcode 1 $PYTHON bench/gpu/sanitized.py
$CHECK table "$OUT"
