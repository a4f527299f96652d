#!/usr/bin/env bash
# Starts the trainer ranks of one node where something other than Slurm (such as Kubernetes) allocates the nodes. Run it on
# every node:
#   NODES=2 NODE=0 MASTER=10.0.0.5 launch/torchrun.sh configs/my.toml 'rollout.urls=["http://10.0.0.9:30000"]'
set -euo pipefail
export PYTHONHASHSEED="${PYTHONHASHSEED:-0}" # some tasks iterate over sets to make prompts
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes="${NODES:-1}" --node-rank="${NODE:-0}" \
    --nproc-per-node="${RANKS:-8}" --master-addr="${MASTER:-127.0.0.1}" --master-port="${PORT:-29500}" \
    -m megatron_rl train "$@"
