#!/usr/bin/env bash
# A job of megatron-rl $version, rendered by
#   $command
# Read it, change it, submit it with sbatch.

$header

set -uo pipefail
run=$run
config=($config)
nodes_needed=$nodes ranks=$ranks ranks_per_node=$ranks_per_node servers=$servers
preflight=$preflight restarts=$restarts hung=$hung resume=$resume
cd $folder || exit 2

$setup

# Every start of the job has folders of its own for logs and for the servers' addresses; a requeued one keeps its number.
start="$$SLURM_JOB_ID.$${SLURM_RESTART_COUNT:-0}"
logs="$$run/slurm/$$start"
registry="$$run/fleet/$$start"
mkdir -p "$$logs" "$$registry" || exit 2
[ $$resume = 1 ] || [ "$${SLURM_RESTART_COUNT:-0}" -gt 0 ] && config+=(train.resume=true)
say() { echo "$$(date -u +%FT%TZ) $$*"; }

# Addresses as Slurm itself uses them. MASTER_ADDR and MASTER_PORT bring the ranks together.
export MEGATRON_RL_NODES=""
for list in $${!SLURM_JOB_NODELIST_HET_GROUP_@} SLURM_JOB_NODELIST; do
    for node in $$(scontrol show hostnames "$${!list}"); do
        address="$$(scontrol show node "$$node" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')"
        MEGATRON_RL_NODES+="$$node=$$address "
    done
done
nodes=($$(scontrol show hostnames "$$$trainer_nodes"))
say "job $$start: trainer on $${nodes[*]}, config $${config[*]}"

# One step: srun, the container if there is one, megatron-rl. Its srun options stand in the array "options".
step() { $step "$$@"; }

if [ $$preflight = 1 ]; then
    options=($trainer --overlap --nodes=$${#nodes[@]} --ntasks-per-node=1 --output="$$logs/preflight-%t.log")
    options+=(--kill-on-bad-exit=0 --time=5)
    step preflight report --folder "$$logs/preflight" "$${config[@]}"
    options=($trainer --overlap --nodes=1 --ntasks=1 --nodelist="$${nodes[0]}")
    step preflight judge --folder "$$logs/preflight" --needed $$nodes_needed --nodes "$${nodes[@]}" || exit 2
    nodes=($$(<"$$logs/preflight/nodes"))
fi
nodelist="$$(IFS=,; echo "$${nodes[*]:0:nodes_needed}")"
export MASTER_ADDR="$$(sed -n "s/\(.* \)\?$${nodes[0]}=\([^ ]*\).*/\2/p" <<<"$$MEGATRON_RL_NODES")"
export MASTER_PORT="$$((20000 + SLURM_JOB_ID % 10000))"
on_ranks=($trainer --overlap --nodes=$$nodes_needed --nodelist="$$nodelist")
on_ranks+=(--ntasks=$$ranks --ntasks-per-node=$$ranks_per_node)
if [ $$preflight = 1 ]; then
    options=("$${on_ranks[@]}" --output="$$logs/links-%t.log")
    step preflight link --folder "$$logs/preflight" || { say "a link between the nodes failed, see $$logs"; exit 2; }
    cat "$$logs/preflight/links"
fi

# The fleet: servers write their addresses to the registry, and end when a file "end" stands there.
fleet=""
if [ $$servers -gt 0 ]; then
    options=($fleet $server_options --ntasks=$$servers --kill-on-bad-exit=0 --output="$$logs/server-%t.log")
    step fleet --registry "$$registry" "$${config[@]}" &
    fleet=$$!
    config+=("rollout.registry=$$registry")
fi

options=("$${on_ranks[@]}" --output="$$logs/rank-%t.log")
step train "$${config[@]}" &
trainer=$$!

# Slurm's signal before the time limit: the ranks finish their step, write a checkpoint and end with 130. srun hands
# USR1 on to them; TERM would make it kill the step.
stopping=0
ask_to_stop() { say "$$1: the ranks finish their step"; kill -USR1 "$$trainer" 2>/dev/null; }
trap 'stopping=1; ask_to_stop "the time limit is near"' USR1
# A fleet that is gone for good must not leave the ranks waiting.
if [ -n "$$fleet" ]; then
    (
        while kill -0 "$$fleet" 2>/dev/null; do sleep 2; done
        [ -e "$$registry/end" ] || ask_to_stop "the fleet ended"
    ) &
fi

while :; do
    wait "$$trainer"
    code=$$?
    kill -0 "$$trainer" 2>/dev/null || break
done
if [ $$code -gt 128 ] && [ $$code -ne 130 ]; then # perhaps only a signal ended the wait
    wait "$$trainer"
    again=$$?
    [ $$again -ne 127 ] && code=$$again
fi
say "the trainer ended with $$code"
touch "$$registry/end"
[ -n "$$fleet" ] && { wait "$$fleet"; say "the fleet ended"; }

queue_again() {
    if [ "$${SLURM_RESTART_COUNT:-0}" -ge $$restarts ]; then
        say "$$1, but the job was restarted $$restarts times already (slurm.restarts)"
        return
    fi
    say "$$1: the job goes back into the queue and will continue from its newest checkpoint"
    scontrol requeue "$$SLURM_JOB_ID" && sleep 120 # until Slurm ends this script
}
[ $$code -ne 0 ] && [ $$stopping -eq 1 ] && queue_again "the time limit is near"
[ $$code -eq $$hung ] && queue_again "the ranks hung, see $$run/hang"
exit $$code
