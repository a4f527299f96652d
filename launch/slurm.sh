#!/usr/bin/env bash
# Submits a run to Slurm: launch/slurm.sh configs/my.toml train.steps=500
# Without submitting: megatron-rl slurm configs/my.toml train.steps=500
set -euo pipefail
exec "${PYTHON:-python}" -m megatron_rl slurm "$@" --submit
