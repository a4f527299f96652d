# ---- The rest is the same for every job. ----------------------------------------------------------------------------
set -uo pipefail
log() { echo "$(date -u +%FT%TZ) $*"; }
count="${SLURM_RESTART_COUNT:-0}"
[ "$count" -le "$restarts" ] || { log "the job was restarted $restarts times already (slurm.restarts)"; exit 2; }

# Every start of the job has its own folders for logs and server addresses; a requeued job keeps its number.
start="$SLURM_JOB_ID.$count"
logs="$run/slurm/$start" registry="$run/fleet/$start"
outputs="${logs//%/%%}" # srun expands % in the names of its output files
mkdir -p "$logs" "$registry" || { log "cannot write $run: is it on a file system that every node sees?"; exit 2; }
touch "$logs/began"
if [ "$resume" = 1 ] || [ "$count" -gt 0 ]; then config+=(train.resume=true); fi

# Trainer and fleet are the components of a heterogeneous job, or share the nodes of a plain job.
trainer_nodes=SLURM_JOB_NODELIST on_trainer=(--overlap) on_fleet=(--overlap)
if [ "${SLURM_HET_SIZE:-1}" -gt 1 ]; then
    trainer_nodes=SLURM_JOB_NODELIST_HET_GROUP_0 on_trainer=(--het-group=0 --overlap) on_fleet=(--het-group=1)
fi
on_trainer+=(--cpus-per-task="$cpus_per_rank")
[ "$gpus_per_node" -gt 0 ] && on_trainer+=(--gpus-per-node="$gpus_per_node")

# Node addresses as Slurm itself uses them.
export MEGATRON_RL_NODES=""
for list in ${!SLURM_JOB_NODELIST_HET_GROUP_@} SLURM_JOB_NODELIST; do
    MEGATRON_RL_NODES+="$(scontrol show node "${!list}" --oneliner |
        sed -n 's/^NodeName=\([^ ]*\) .* NodeAddr=\([^ ]*\).*/\1=\2/p' | tr '\n' ' ')"
done
nodes=($(scontrol show hostnames "${!trainer_nodes}"))
log "job $start: trainer on ${nodes[*]}, config ${config[*]}"

# Preflight: check every node, compare the nodes, test the links between them. Spare nodes replace faulty ones.
preflight_module=megatron_rl.launch.slurm.preflight
if [ "$preflight" = 1 ]; then
    options=("${on_trainer[@]}" --nodes=${#nodes[@]} --ntasks=${#nodes[@]} --ntasks-per-node=1)
    options+=(--output="$outputs/preflight-%t.log" --kill-on-bad-exit=0 --time=5)
    (step $preflight_module report --folder "$logs/preflight" "${config[@]}")
    options=("${on_trainer[@]}" --nodes=1 --ntasks=1 --nodelist="${nodes[0]}")
    (step $preflight_module judge --folder "$logs/preflight" --needed "$nodes_needed" --nodes "${nodes[@]}") || exit 2
    nodes=($(<"$logs/preflight/nodes"))
fi
nodelist="$(IFS=,; echo "${nodes[*]:0:nodes_needed}")"
MASTER_ADDR="$(tr ' ' '\n' <<<"$MEGATRON_RL_NODES" | sed -n "s/^${nodes[0]}=//p" | head -n 1)"
MASTER_PORT="$((20000 + SLURM_JOB_ID % 10000))"
export MASTER_ADDR MASTER_PORT
export PYTHONHASHSEED="${PYTHONHASHSEED:-0}" # some tasks iterate over sets to make prompts
on_ranks=("${on_trainer[@]}" --nodes="$nodes_needed" --nodelist="$nodelist")
on_ranks+=(--ntasks="$((nodes_needed * ranks_per_node))" --ntasks-per-node="$ranks_per_node")
if [ "$preflight" = 1 ]; then
    options=("${on_ranks[@]}" --output="$outputs/links-%t.log")
    (step $preflight_module link --folder "$logs/preflight") || { log "a link between the nodes failed, see $logs"; exit 2; }
    cat "$logs/preflight/links"
fi

# The fleet: servers write their addresses to the registry, and exit when the file "end" appears in it. With preflight
# the ranks wait until the file "unchecked" is gone: every server has answered a request.
fleet=""
if [ "$servers" -gt 0 ]; then
    [ "$preflight" = 1 ] && touch "$registry/unchecked"
    options=("${on_fleet[@]}" "${server_options[@]}" --ntasks="$servers")
    options+=(--kill-on-bad-exit=0 --output="$outputs/server-%t.log")
    step megatron_rl.launch.slurm.serve_node --registry "$registry" "${config[@]}" &
    fleet=$!
    config+=("rollout.registry=$registry")
fi

# Servers that are already running are checked before the ranks start. Servers of this job load their model while the
# ranks load theirs, and are checked meanwhile.
check_fleet() {
    options=("${on_trainer[@]}" --nodes=1 --ntasks=1 --nodelist="${nodes[0]}")
    (step $preflight_module fleet "${config[@]}")
}
if [ "$preflight" = 1 ] && [ -z "$fleet" ]; then
    check_fleet || { log "a server of rollout.urls failed its check"; exit 2; }
fi

options=("${on_ranks[@]}" --output="$outputs/rank-%t.log")
step megatron_rl train "${config[@]}" &
trainer=$!
fleet_failed="$logs/fleet-failed"
if [ "$preflight" = 1 ] && [ -n "$fleet" ]; then
    (check_fleet || { touch "$fleet_failed"; kill -TERM "$trainer" 2>/dev/null; }) &
fi

# On USR1, which Slurm sends before the time limit, the ranks finish their step, write a checkpoint and exit with 130.
# srun forwards USR1 to them; TERM makes srun end the step at once.
stopping=0
request_stop() { log "$1: the ranks finish their step"; kill -USR1 "$trainer" 2>/dev/null; }
trap 'stopping=1; request_stop "the time limit is near"' USR1
# Without a fleet the ranks would wait indefinitely.
if [ -n "$fleet" ]; then
    (
        while kill -0 "$fleet" 2>/dev/null; do sleep 2; done
        [ -e "$registry/end" ] || { touch "$logs/fleet-lost"; request_stop "the fleet ended"; }
    ) &
fi

while :; do
    wait "$trainer"
    code=$?
    kill -0 "$trainer" 2>/dev/null || break
done
if [ $code -gt 128 ] && [ $code -ne 130 ]; then # perhaps a signal interrupted the wait
    wait "$trainer"
    again=$?
    [ $again -ne 127 ] && code=$again
fi
log "the trainer ended with $code"
touch "$registry/end"
[ -n "$fleet" ] && { wait "$fleet"; log "the fleet ended"; }

requeue() {
    if [ "$count" -ge "$restarts" ]; then
        log "$1, but the job was restarted $restarts times already (slurm.restarts)"
        return
    fi
    log "$1: the job is requeued and will continue from its newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID" && sleep 120 # until Slurm ends this script
}
# Killed or aborted ranks (134: NCCL ends a rank whose collective timed out) or killed servers restart the job, unless
# Slurm itself is ending it. The kernel kills when memory runs out. Slurm
# also repeats the kill that a dead node missed: it ends the step of the same number after node and job are back.
killed_from_outside() {
    [ $code -eq 134 ] || [ $code -eq 137 ] || [ $code -eq 143 ] || { [ $code -ne 0 ] && [ -e "$logs/fleet-lost" ]; } || return 1
    [ "$count" -gt 0 ] || [ "$run/metrics.jsonl" -nt "$logs/began" ] || return 1 # no step finished: it would fail again
    scontrol show job "$SLURM_JOB_ID" --oneliner | grep -q "JobState=RUNNING"
}
[ -e "$fleet_failed" ] && { log "a server of the fleet failed its check, see above"; exit 2; }
[ $code -ne 0 ] && [ $stopping -eq 1 ] && requeue "the time limit is near"
# srun kills a rank that is stopped, and reports that instead of the other ranks' code 75; the new report shows the hang.
if [ $code -eq 75 ] || { [ $code -ne 0 ] && [ "$run/hang/report.txt" -nt "$logs/began" ]; }; then
    requeue "the ranks hung, see $run/hang"
    code=75
elif killed_from_outside; then
    requeue "ranks or servers were killed"
fi
exit $code
