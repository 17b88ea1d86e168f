#!/usr/bin/env bash
# All that needs a GPU, in under nine minutes: the extension, the GPU tests, the benchmarks; a short table last.
# Every step runs whatever became of the ones before it; the exit status is 1 if any failed.
# Logs and JSON go to $OUT, or to bench/results. PYTHON names the interpreter; SWEEP=1 adds the block-size sweep.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
results=${OUT:-bench/results}
mkdir -p "$results"
export OUT="$results" PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

deadline=$((SECONDS + 530))
failed=()

# step NAME SECONDS COMMAND...: runs it for that long at most, and never past the deadline.
step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS status=0
    shift 2
    if ((left < 5)); then
        echo "== $name: no time left"
        failed+=("$name (not run)")
        return
    fi
    echo "== $name"
    timeout --kill-after=10 "$((limit < left ? limit : left))" "$@" 2>&1 | tee "$results/$name.log" || status=$?
    echo "== $name: status $status after $((SECONDS - start)) s"
    ((status == 0)) || failed+=("$name ($status)")
}

if [[ -d csrc ]]; then
    step build 120 env PKT_BUILD_EXT=1 "$python" setup.py --quiet build_ext --inplace
fi
step tests 240 "$python" -m pytest -m gpu -q --durations=5
if command -v compute-sanitizer >/dev/null; then
    step sanitizer 60 compute-sanitizer --error-exitcode 9 "$python" -m pytest -m gpu -q tests/test_kernels_gpu.py \
        -k small_case
fi
step kernels 150 "$python" bench/bench_kernels.py --device cuda
step model 120 "$python" bench/bench_kernels.py --device cuda --groups "" --model 13b
if [[ -n ${SWEEP:-} ]]; then
    step sweep 120 "$python" bench/bench_kernels.py --device cuda --groups "" --sweep --out "$results/sweep"
fi
if [[ -f bench/bench_rsvd.py ]]; then
    step rsvd 110 "$python" bench/bench_rsvd.py --device cuda --student --layers 8
fi
step stream 150 "$python" bench/bench_stream.py --device cuda

echo
echo "== summary"
tail -qn 1 "$results/tests.log" 2>/dev/null
grep -hE '^(ceilings|linear_sens|abs_acc|embedding|best_window|axis|block|llama|stream)' \
    "$results/kernels.log" "$results/model.log" "$results/stream.log" 2>/dev/null | cut -c 1-140
if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all steps passed"
