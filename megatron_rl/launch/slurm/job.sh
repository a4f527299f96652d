# ---- From here on every job is the same. ----------------------------------------------------------------------------
set -uo pipefail
say() { echo "$(date -u +%FT%TZ) $*"; }
count="${SLURM_RESTART_COUNT:-0}"
[ "$count" -le "$restarts" ] || { say "the job was restarted $restarts times already (slurm.restarts)"; exit 2; }

# Every start of the job has folders of its own for logs and for the servers' addresses; a requeued one keeps its number.
start="$SLURM_JOB_ID.$count"
logs="$run/slurm/$start" registry="$run/fleet/$start"
mkdir -p "$logs" "$registry" || { say "cannot write $run: is it on a file system that every node sees?"; exit 2; }
touch "$logs/began"
if [ "$resume" = 1 ] || [ "$count" -gt 0 ]; then config+=(train.resume=true); fi

# Trainer and fleet are components of one heterogeneous job, or share the nodes of a plain one.
trainer_nodes=SLURM_JOB_NODELIST on_trainer=(--overlap) on_fleet=(--overlap)
if [ "${SLURM_HET_SIZE:-1}" -gt 1 ]; then
    trainer_nodes=SLURM_JOB_NODELIST_HET_GROUP_0 on_trainer=(--het-group=0 --overlap) on_fleet=(--het-group=1)
fi
on_trainer+=(--cpus-per-task="$cpus_per_rank")
[ "$gpus_per_node" -gt 0 ] && on_trainer+=(--gpus-per-node="$gpus_per_node")

# Addresses as Slurm itself uses them. MASTER_ADDR and MASTER_PORT bring the ranks together.
export MEGATRON_RL_NODES=""
for list in ${!SLURM_JOB_NODELIST_HET_GROUP_@} SLURM_JOB_NODELIST; do
    MEGATRON_RL_NODES+="$(scontrol show node "${!list}" --oneliner |
        sed -n 's/^NodeName=\([^ ]*\) .* NodeAddr=\([^ ]*\).*/\1=\2/p' | tr '\n' ' ')"
done
nodes=($(scontrol show hostnames "${!trainer_nodes}"))
say "job $start: trainer on ${nodes[*]}, config ${config[*]}"

# The preflight: is every node fit, are they alike, do they reach each other. Nodes to spare may be left out.
if [ "$preflight" = 1 ]; then
    options=("${on_trainer[@]}" --nodes=${#nodes[@]} --ntasks=${#nodes[@]} --ntasks-per-node=1)
    options+=(--output="$logs/preflight-%t.log" --kill-on-bad-exit=0 --time=5)
    (step preflight report --folder "$logs/preflight" "${config[@]}")
    options=("${on_trainer[@]}" --nodes=1 --ntasks=1 --nodelist="${nodes[0]}")
    (step preflight judge --folder "$logs/preflight" --needed "$nodes_needed" --nodes "${nodes[@]}") || exit 2
    nodes=($(<"$logs/preflight/nodes"))
fi
nodelist="$(IFS=,; echo "${nodes[*]:0:nodes_needed}")"
MASTER_ADDR="$(tr ' ' '\n' <<<"$MEGATRON_RL_NODES" | sed -n "s/^${nodes[0]}=//p" | head -n 1)"
MASTER_PORT="$((20000 + SLURM_JOB_ID % 10000))"
export MASTER_ADDR MASTER_PORT
export PYTHONHASHSEED="${PYTHONHASHSEED:-0}" # some tasks make prompts by way of sets
on_ranks=("${on_trainer[@]}" --nodes="$nodes_needed" --nodelist="$nodelist")
on_ranks+=(--ntasks="$((nodes_needed * ranks_per_node))" --ntasks-per-node="$ranks_per_node")
if [ "$preflight" = 1 ]; then
    options=("${on_ranks[@]}" --output="$logs/links-%t.log")
    (step preflight link --folder "$logs/preflight") || { say "a link between the nodes failed, see $logs"; exit 2; }
    cat "$logs/preflight/links"
fi

# The fleet: servers write their addresses to the registry, and end when a file "end" stands there.
fleet="" asked=("${config[@]}")
if [ "$servers" -gt 0 ]; then
    options=("${on_fleet[@]}" "${server_options[@]}" --ntasks="$servers")
    options+=(--kill-on-bad-exit=0 --output="$logs/server-%t.log")
    step fleet --registry "$registry" "${config[@]}" &
    fleet=$! answered="$registry"
    [ "$preflight" = 1 ] && answered="$registry/asked"
    asked+=("rollout.registry=$registry") config+=("rollout.registry=$answered")
fi

# Each server answers a short request before the run relies on it. Servers that run already are asked before the ranks
# start. Those of this job load their model while the ranks load theirs; they are asked as soon as they are there, and
# the ranks learn their addresses when all have answered.
ask_fleet() {
    options=("${on_trainer[@]}" --nodes=1 --ntasks=1 --nodelist="${nodes[0]}")
    (step preflight fleet --folder "$registry/asked" "$@")
}
if [ "$preflight" = 1 ] && [ -z "$fleet" ]; then
    ask_fleet "${asked[@]}" || { say "a server of rollout.urls is not fit"; exit 2; }
fi

options=("${on_ranks[@]}" --output="$logs/rank-%t.log")
step train "${config[@]}" &
trainer=$!
unfit="$logs/fleet-unfit"
if [ "$preflight" = 1 ] && [ -n "$fleet" ]; then
    (ask_fleet "${asked[@]}" || { touch "$unfit"; kill -TERM "$trainer" 2>/dev/null; }) &
fi

# Slurm's signal before the time limit: the ranks finish their step, write a checkpoint and end with 130. srun hands
# USR1 on to them; TERM makes it end the step at once.
stopping=0
ask_to_stop() { say "$1: the ranks finish their step"; kill -USR1 "$trainer" 2>/dev/null; }
trap 'stopping=1; ask_to_stop "the time limit is near"' USR1
# A fleet that is gone for good must not leave the ranks waiting.
if [ -n "$fleet" ]; then
    (
        while kill -0 "$fleet" 2>/dev/null; do sleep 2; done
        [ -e "$registry/end" ] || { touch "$logs/fleet-lost"; ask_to_stop "the fleet ended"; }
    ) &
fi

while :; do
    wait "$trainer"
    code=$?
    kill -0 "$trainer" 2>/dev/null || break
done
if [ $code -gt 128 ] && [ $code -ne 130 ]; then # perhaps only a signal ended the wait
    wait "$trainer"
    again=$?
    [ $again -ne 127 ] && code=$again
fi
say "the trainer ended with $code"
touch "$registry/end"
[ -n "$fleet" ] && { wait "$fleet"; say "the fleet ended"; }

queue_again() {
    if [ "$count" -ge "$restarts" ]; then
        say "$1, but the job was restarted $restarts times already (slurm.restarts)"
        return
    fi
    say "$1: the job goes back into the queue and will continue from its newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID" && sleep 120 # until Slurm ends this script
}
# What was killed may go on, unless Slurm itself ends the job. It is the kernel that kills, short of memory; or Slurm, which
# hands a kill that a dead node missed to the step of the same number when node and job are back.
killed_from_outside() {
    [ $code -eq 137 ] || [ $code -eq 143 ] || { [ $code -ne 0 ] && [ -e "$logs/fleet-lost" ]; } || return 1
    [ "$count" -gt 0 ] || [ "$run/metrics.jsonl" -nt "$logs/began" ] || return 1 # it never ran: it would not run again
    scontrol show job "$SLURM_JOB_ID" --oneliner | grep -q "JobState=RUNNING"
}
[ -e "$unfit" ] && { say "a server of the fleet is not fit, see above"; exit 2; }
[ $code -ne 0 ] && [ $stopping -eq 1 ] && queue_again "the time limit is near"
# A rank that is stopped does not end with 75 like the others: srun must kill it, and tells of that. The report is new.
if [ $code -eq 75 ] || { [ $code -ne 0 ] && [ "$run/hang/report.txt" -nt "$logs/began" ]; }; then
    queue_again "the ranks hung, see $run/hang"
    code=75
elif killed_from_outside; then
    queue_again "ranks or servers were killed"
fi
exit $code
