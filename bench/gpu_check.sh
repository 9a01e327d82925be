#!/usr/bin/env bash
# Everything about hetis on one GPU that can be known in eight minutes, on a bare machine without network.
#
#     OUT=results WHEELS=wheels bash bench/gpu_check.sh [PHASE ...]
#
# Phases come in the order of their value; each has a time limit and appends one JSON line (card, driver, versions, date,
# outcome, figures) to $OUT/gpu_check.jsonl; a table comes last. All output is in $OUT/gpu_check.log. Without a GPU the
# phases that can run do, on the CPU and with a tiny model, and the others say that they need one.
#
# WHEELS: a folder with wheels of packages that the machine lacks (msgspec, pyzmq). PYTHON: the interpreter (python3).
# Needs torch, triton, transformers, pytest, pytest-xdist, a C++ compiler and the headers of Python.
set -uo pipefail
cd "$(dirname "$0")/.."

TOTAL_SECONDS=480
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-bench/results/gpu_check}")
SITE=$(mktemp -d)
CHECK="$PYTHON bench/gpu/report.py"
LOG=$OUT/gpu_check.log
mkdir -p "$OUT"
trap 'rm -rf "$SITE"; [ -z "${BUILD:-}" ] || kill "$BUILD" 2>/dev/null' EXIT

if [ -n "${WHEELS:-}" ]; then
    $PYTHON -m pip install --quiet --no-index --no-deps --target "$SITE" "$WHEELS"/*.whl || exit 1
fi
ln -s "$PWD/kernels" "$SITE/hetis_kernels"
export PYTHONPATH=$SITE:$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OUT
GPU=$($PYTHON -c 'import torch; print(int(torch.cuda.is_available()))') || exit 1
DEVICE=$([ "$GPU" = 1 ] && echo cuda || echo cpu)
[ "$GPU" = 1 ] && export TRITON_INTERPRET=0

# name, seconds, whether it needs a GPU, command
phase() {
    local name=$1 limit=$2 needs_gpu=$3 begin=$SECONDS outcome
    shift 3
    [ -z "$WANTED" ] || [[ " machine $WANTED " == *" $name "* ]] || return 0
    local left=$((TOTAL_SECONDS - SECONDS))
    if [ "$needs_gpu" = gpu ] && [ "$GPU" = 0 ]; then
        outcome="needs a GPU"
    elif [ $left -lt 5 ]; then
        outcome="no time left"
    else
        echo "== $name" | tee -a "$LOG"
        timeout --kill-after=5 $((limit < left ? limit : left)) "$@" 2>&1 | tee "$OUT/phase.log" | tail -n 25
        case ${PIPESTATUS[0]} in
            0) outcome=ok ;;
            124 | 137) outcome="over $limit s" ;;
            *) outcome=failed ;;
        esac
        cat "$OUT/phase.log" >>"$LOG"
    fi
    $CHECK add "$OUT" "$name" "$outcome" $((SECONDS - begin))
    rm -f "$OUT/phase.log"
}

WANTED=$*
TESTS="$PYTHON -m pytest -m gpu --timeout 100 -p no:cacheprovider"
$PYTHON setup.py --quiet build_ext --inplace >"$OUT/build.log" 2>&1 & BUILD=$!
phase machine 30 any $CHECK machine "$OUT"
phase kernels 100 gpu $TESTS --numprocesses 12 tests/kernels
wait $BUILD || { echo "the C++ extensions do not build:"; tail -n 20 "$OUT/build.log"; }
BUILD=
phase ranks 50 gpu $TESTS --numprocesses 8 tests/workers tests/comm
phase fleets 90 gpu $TESTS --numprocesses 6 tests/engine tests/server
phase generate 40 any $PYTHON bench/gpu/generate.py --device $DEVICE
phase decode 60 any $PYTHON bench/gpu/decode.py --device $DEVICE
phase bandwidth 55 gpu $PYTHON bench/bench_kernels.py --output "$OUT/kernels.jsonl"
phase throughput 70 any $PYTHON bench/gpu/throughput.py --device $DEVICE
phase links 40 any $PYTHON bench/bench_links.py --kinds shm --device $DEVICE --json "$OUT/links.json"
phase sanitizer 45 gpu compute-sanitizer --tool racecheck --error-exitcode 1 $PYTHON bench/gpu/sanitized.py
$CHECK table "$OUT"
