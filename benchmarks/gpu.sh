#!/usr/bin/env bash
# All that docs/gpu.md measures, in calls of less than ten minutes each:
#   benchmarks/gpu.sh OUT smoke      under three minutes: import, layers, one step and log-probs on both paths, tests -m gpu
#   benchmarks/gpu.sh OUT setup      makes .venv with a CUDA build of torch, prints what is there, runs tests -m gpu
#   benchmarks/gpu.sh OUT parts      matrix limit, copies, segment sums, push; the vocabulary operation
#   benchmarks/gpu.sh OUT ipc        a weight push through shared memory to a server on the same device
#   benchmarks/gpu.sh OUT small      1.5B: packed 8k and 32k, recomputation, plain paths, determinism, profile
#   benchmarks/gpu.sh OUT large      10B: forward and backward (its optimizer state does not fit on one device)
#   benchmarks/gpu.sh OUT demo       the demo on one device
#   SMOLLM2=FOLDER benchmarks/gpu.sh OUT smollm2     the five objectives on a real model (tools/fetch_smollm2.py FOLDER)
#   benchmarks/gpu.sh OUT tables     OUT/tables.md
#   benchmarks/gpu.sh OUT all        smoke, parts, ipc, small, large and tables
#   benchmarks/gpu.sh OUT all --device cpu --tiny     every script end to end on a CPU, small
#   PYTHON=.venv-te/bin/python benchmarks/gpu.sh OUT smoke --device cpu --doubles     transformer-engine on a CPU
# A step that fails is named at the end; the others run. OUT/log keeps what they print; OUT/result.json has every step
# with its exit code and seconds, all figures, hardware and versions.
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
    local started=$SECONDS code
    echo "-- $name: $*" | tee -a "$out/log"
    "$@" 2>&1 | tee -a "$out/log"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || failed+=("$name")
    printf '%s\t%s\t%s\t%s\t%s\n' "$stage" "$name" "$code" $((SECONDS - started)) "$*" >>"$out/steps.tsv"
}

step() {
    local name="$1"
    shift
    run "$name" "$python" benchmarks/gpu_step.py "$out/step-$name.json" --limit "$out/limit.json" "$@" "${options[@]}"
}

part() { run "$1" "$python" benchmarks/gpu_parts.py "$1" "$out/$1.json" "${options[@]}"; }

smoke() {
    for part in import spec step parity; do
        run "smoke-$part" "$python" -W ignore benchmarks/gpu_smoke.py "$part" "$out/smoke-$part.json" "${options[@]}"
    done
    if ! $tiny; then
        local device=(parallel.tensor=1 parallel.expert=1 model.dtype=bfloat16 train.steps=1)
        run demo-engine "$python" -m megatron_rl train configs/demo.toml "${device[@]}" "log.path=$(realpath "$out")/demo-engine"
        MEGATRON_RL_PLAIN=engine run demo-local "$python" -m megatron_rl train configs/demo.toml "${device[@]}" \
            "log.path=$(realpath "$out")/demo-local"
        run tests "$python" -m pytest -m gpu -q
    fi
}

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
    smoke | setup | parts | ipc | small | large | demo | smollm2 | tables) $stage ;;
    all) for stage in smoke parts ipc small $($tiny || echo large) tables; do $stage; done ;;
    *) echo "no stage $stage: write smoke, setup, parts, ipc, small, large, demo, smollm2, tables or all" >&2; exit 2 ;;
esac
"$python" benchmarks/gpu_result.py "$out" || failed+=("result")
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
