#!/usr/bin/env bash
# All that needs a GPU, in one slot of $DEADLINE seconds (530): what each op runs on, whether it is right, how fast it is.
#
#   OUT=folder bench/gpu.sh                                  # everything, the most important first
#   OUT=folder STEPS="build assert smoke stream" bench/gpu.sh    # some of it, so that it can be two calls on one machine
#   OUT=folder DEVICE=cpu bench/gpu.sh                       # a rehearsal: each step's twin on a CPU, in tiny shapes
#
# Steps, always in this order: build assert warm smoke tune stream kernels rsvd profile model tests sanitizer racecheck (and, when they
# are named, sweep, and descendant: a real pair, by itself within the deadline; GSM8K names its rows, SMOLLM2 a model folder).
# A failed build or assertion stops the rest: figures of torch's own operations would be no figures of pkt. Otherwise every step
# runs whatever became of those before it. $OUT (bench/results) then holds JSON files, written after every group of a bench, and
# logs.tar.gz: at most eight files. The last lines are a table of the design's goals. The exit status is 1 if a step failed.
# PYTHON names the interpreter. STAND_IN_<step> is a command that runs in a step's place: tests/test_bench.py's.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
device=${DEVICE:-cuda}
results=${OUT:-bench/results}
deadline=${DEADLINE:-530}
steps=${STEPS:-build assert warm smoke tune stream kernels rsvd profile model tests sanitizer racecheck}
mkdir -p "$results"
results=$(cd "$results" && pwd)
logs=$(mktemp -d)
rm -f "$results/steps.jsonl"
export OUT="$results" PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

# A step's share of the deadline. What it does not use is the next one's, so it may run until all shares up to its own are over.
declare -A share=([build]=90 [assert]=40 [warm]=40 [smoke]=20 [tune]=40 [stream]=120 [kernels]=75 [rsvd]=45 [profile]=35 [model]=40 [tests]=70 [sanitizer]=30
    [racecheck]=30 [sweep]=120 [descendant]=530)
total=0 reached=0 stopped="" failed=()
for name in $steps; do
    [[ -n ${share[$name]:-} ]] || { echo "there is no step $name; there are ${!share[*]}" >&2; exit 2; }
    ((total += share[$name]))
done

tiny=() rehearsal=() size=13b
[[ $device == cpu ]] && tiny=(--tiny) rehearsal=(--rehearsal) size=tiny

# command_of NAME: sets `command`, or `missing` to the reason why there is none.
command_of() {
    local stand_in=STAND_IN_$1 gpu_tests
    missing=""
    if [[ -n ${!stand_in:-} ]]; then
        command=(bash -c "${!stand_in}")
        return
    fi
    case $1 in
        build) command=("$python" bench/build_extension.py --device "$device") ;;
        assert) command=("$python" bench/smoke.py --device "$device" --implementations) ;;
        # Compiles what the steps after it launch, on several cores at once.
        warm)
            command=(bash -c "for ops in abs 'embedding|best|rsvd' 'linear_sensitivity_$' 'linear_sensitivity_tiles_$' '.*@'; do
                n=\$((n + 1)); '$python' bench/smoke.py --device $device --out \"$logs/warm/\$n\" --only \"\$ops\" & done
                wait; rm -rf '$logs/warm'")
            ;;
        smoke) command=("$python" bench/smoke.py --device "$device") ;;
        # The kernels to choose from, each against today's; what was found serves the steps after it. Steps that ask whether ops
        # are right take today's, and say themselves which other they try.
        tune) command=("$python" -m pkt env --tune) ;;
        stream) command=("$python" bench/bench_stream.py --device "$device" "${tiny[@]}") ;;
        kernels) command=("$python" bench/bench_kernels.py --device "$device" "${tiny[@]}") ;;
        rsvd) command=("$python" bench/bench_rsvd.py --device "$device" "${tiny[@]}" --shapes 11008x4096,4096x4096 --ranks 16
            --full --odd --quality --student --layers 8) ;;
        profile) command=("$python" bench/profile_gpu.py --device "$device" "${tiny[@]}") ;;
        model) command=("$python" bench/bench_kernels.py --device "$device" "${tiny[@]}" --model "$size" --batch 4) ;;
        sweep) command=("$python" bench/bench_kernels.py --device "$device" "${tiny[@]}" --sweep) ;;
        descendant)
            command=("$python" examples/descendant.py --device "$device" --out "$results" --gsm8k "${GSM8K:-}"
                ${SMOLLM2:+--model "$SMOLLM2"} --heal-tokens 4000000 --heal-batch 32 --length 256 --own 1024 --teacher-rows 800
                --train-rows 256 --test-rows 100 --alpha-rows 32 --rates 3e-4 1e-3 3e-3 --seeds 5 --minutes 6)
            [[ $device == cpu ]] && command+=(--tiny)
            [[ $device == cpu || -n ${GSM8K:-} ]] || missing="GSM8K does not name a file of rows"
            ;;
        tests)
            mapfile -t gpu_tests < <(grep -rl --include="test_*.py" "pytest.mark.gpu" tests)
            command=(env PKT_KERNEL=triton "$python" -m pytest -m gpu -v --durations=10 "${gpu_tests[@]}")
            "$python" -c "import xdist" 2>/dev/null && command+=(-n 4 --dist loadfile)
            [[ $device == cpu ]] && command+=(--collect-only)
            ;;
        sanitizer | racecheck)
            # Without the caching allocator, so that each tensor's end is a border that is watched.
            command=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9)
            # Races in shared memory: of the kernels whose warps wait for each other by barriers of their own.
            if [[ $1 == racecheck ]]; then command+=(--tool racecheck); else command+=(--report-api-errors no); fi
            command+=("$python" bench/smoke.py --device "$device" --out "$logs/$1")
            [[ $1 == racecheck ]] && command+=(--only linear_sensitivity)
            command -v compute-sanitizer >/dev/null || missing="there is no compute-sanitizer"
            [[ $device == cpu ]] && missing="there is no GPU"
            ;;
    esac
}

# said NAME TEXT SECONDS: keeps what became of a step.
said() {
    echo "== $1: $2 after $3 s"
    printf '{"step": "%s", "said": "%s", "seconds": %d}\n' "$1" "$2" "$3" >>"$results/steps.jsonl"
    tar -czf "$results/logs.tar.gz" -C "$logs" .
}

run() {
    local name=$1 start=$SECONDS status=0 left log=$logs/$1.log outcome=passed
    ((reached += share[$name]))
    left=$((reached * deadline / total - start))
    command_of "$name"
    echo "== $name: until second $((start + left)) of $deadline"
    if [[ -n $stopped ]]; then
        said "$name" "not run: $stopped" 0
        return
    elif [[ -n $missing ]]; then
        said "$name" "not run: $missing" 0
        return
    elif ((left < 8)); then
        said "$name" "not run: no time left" 0
        failed+=("$name (not run)")
        return
    fi
    # Interrupted as by Ctrl-C, so that pytest sums up; killed with all it started if that does not help. Not into a pipe: what a
    # step leaves running would hold it open.
    timeout --signal=INT --kill-after=3 "$((left - 4))" "${command[@]}" >"$log" 2>&1 </dev/null || status=$?
    case $status in
        0) ;;
        124 | 137) outcome="killed at its limit of $((left - 4)) s" ;;
        *) outcome="failed with status $status" ;;
    esac
    tail -c 3000000 "$log" >"$log.end" && mv "$log.end" "$log"
    tail -n 15 "$log" | cut -c 1-200
    said "$name" "$outcome" "$((SECONDS - start))"
    ((status == 0)) && return
    failed+=("$name ($outcome)")
    [[ $name == build || $name == assert ]] && stopped="$name failed"
}

for name in build assert warm smoke tune stream kernels rsvd profile model tests sanitizer racecheck sweep descendant; do
    [[ " $steps " == *" $name "* ]] && run "$name"
done
rm -rf "$logs"

echo
((${#failed[@]})) && printf 'FAILED: %s\n' "${failed[@]}"
"$python" bench/goals.py --device cuda "${rehearsal[@]}" "$results"
((${#failed[@]} == 0))
