#!/usr/bin/env bash
# All that docs/gpu.md measures, in calls of less than ten minutes each:
#   benchmarks/gpu.sh OUT setup      makes .venv with a CUDA build of torch, prints what is there, runs tests -m gpu
#   benchmarks/gpu.sh OUT parts      matrix limit, copies, segment sums, push; the vocabulary operation
#   benchmarks/gpu.sh OUT ipc        a weight push through shared memory to a server on the same device
#   benchmarks/gpu.sh OUT small      1.5B: packed 8k and 32k, recomputation, plain paths, determinism, profile
#   benchmarks/gpu.sh OUT large      10B: forward and backward (its optimizer state does not fit on one device)
#   benchmarks/gpu.sh OUT demo       the demo on one device
#   SMOLLM2=FOLDER benchmarks/gpu.sh OUT smollm2     the five objectives on a real model (tools/fetch_smollm2.py FOLDER)
#   benchmarks/gpu.sh OUT tables     OUT/tables.md
#   benchmarks/gpu.sh OUT all --device cpu --tiny     every script end to end on a CPU, small
# A step that fails is named at the end; the others run. OUT/log keeps what they print.
set -uo pipefail
cd "$(dirname "$0")/.."
out="$1" stage="$2"
shift 2
mkdir -p "$out"
python="${PYTHON:-.venv/bin/python}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
options=("$@")
tiny=false
case " $* " in *" --tiny "*) tiny=true ;; esac
failed=()

run() {
    local name="$1"
    shift
    echo "-- $name: $*" | tee -a "$out/log"
    "$@" 2>&1 | tee -a "$out/log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$name")
}

step() {
    local name="$1"
    shift
    run "$name" "$python" benchmarks/gpu_step.py "$out/step-$name.json" --limit "$out/limit.json" "$@" "${options[@]}"
}

part() { run "$1" "$python" benchmarks/gpu_parts.py "$1" "$out/$1.json" "${options[@]}"; }

setup() {
    run setup tools/setup
    if command -v nvidia-smi >/dev/null; then run device nvidia-smi; fi
    run check "$python" -m megatron_rl check
    run tests "$python" -m pytest -m gpu -q
    run kernels "$python" -m pytest -q tests/ops/test_kernels.py
}

parts() {
    part limit
    part segments
    part push
    if ! $tiny; then
        run vocabulary "$python" benchmarks/vocab_op.py --device cuda --rows 16384 --hidden 2048 --variants
    fi
}

ipc() { run ipc "$python" benchmarks/gpu_ipc.py ipc "$out/ipc.json" "${options[@]}"; }

small() {
    step 1.5B-8k --size 1.5B --profile
    $tiny && return
    step 1.5B-8k-full --size 1.5B --recompute full
    step 1.5B-8k-selective --size 1.5B --recompute selective
    step 1.5B-32k --size 1.5B --tokens 32768 --length 4096 --rows 1
    step 1.5B-8k-deterministic --size 1.5B --deterministic
    MEGATRON_RL_HEAD=tiles+triton step 1.5B-8k-triton --size 1.5B
    for plain in engine engine,attention engine,experts engine,fusion engine,attention,experts,fusion; do
        MEGATRON_RL_PLAIN=$plain step "1.5B-8k-plain-${plain//,/-}" --size 1.5B
    done
}

large() {
    step 10B-8k --size 10B --recompute full --no-step --profile
    $tiny || step 10B-32k --size 10B --tokens 32768 --length 4096 --rows 1 --recompute full --no-step
}

demo() {
    local steps=60
    $tiny && steps=1
    run demo tools/demo train.steps=$steps "log.path=$(realpath "$out")/demo"
}

# One objective after the other takes minutes; OBJECTIVES="sspo espo" does only these.
smollm2() {
    local work=(train.steps=60 train.prompts_per_step=16 evaluate.every=20 evaluate.prompts=256)
    $tiny && work=(train.steps=1 train.prompts_per_step=2 evaluate.every=0)
    for objective in ${OBJECTIVES:-grpo gspo sapo sspo espo}; do
        run "smollm2-$objective" "$python" -m megatron_rl train studies/objectives/smollm2.toml "objective.name=$objective" \
            "model.path=${SMOLLM2:?write SMOLLM2=FOLDER before the command}" train.group_size=8 train.updates_per_step=4 \
            optimizer.lr=1e-5 "${work[@]}" "log.path=$(realpath "$out")/smollm2-$objective"
    done
}

tables() { run tables sh -c '"$0" benchmarks/gpu_tables.py "$1" | tee "$1/tables.md"' "$python" "$out"; }

case "$stage" in
    setup | parts | ipc | small | large | demo | smollm2 | tables) $stage ;;
    all) for stage in parts ipc small $($tiny || echo large) tables; do $stage; done ;;
    *) echo "no stage $stage: write setup, parts, ipc, small, large, demo, smollm2, tables or all" >&2; exit 2 ;;
esac
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
