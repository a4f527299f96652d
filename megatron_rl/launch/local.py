"""``megatron-rl train``: starts the trainer ranks on this machine, or is one rank if torchrun or srun started it."""

import os
import sys
from collections.abc import Sequence

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.distributed.ledger import record_collectives
from megatron_rl.distributed.mesh import rank_from_environment
from megatron_rl.launch.failures import reporting_failure
from megatron_rl.launch.planning.run_plan import RunPlan, make_plan
from megatron_rl.launch.quiet import quiet_upstream
from megatron_rl.launch.ranks import PREPARED, LocalRanks
from megatron_rl.observability.run_folder import prepare_folder
from megatron_rl.train.resume import check_resumable


def main(loaded: Loaded[Run], words: Sequence[str]) -> int:
    """Train; return the exit code: 0 at the end, 130 after a stop request (resumable), 75 after a hang."""
    launched = rank_from_environment()
    if launched is not None:
        rank, size, _ = launched
        if PREPARED not in os.environ:  # started by torchrun or srun, not by LocalRanks
            plan = make_plan(loaded, size)
            check_resumable(loaded.run)
            if rank == 0:
                _print_warnings(plan)
                prepare_folder(loaded.run)
        quiet_upstream()
        record_collectives()
        with reporting_failure():
            from megatron_rl.train.rank import run_rank

            return run_rank(loaded)
    plan = make_plan(loaded)
    _print_warnings(plan)
    check_resumable(loaded.run)
    for change in prepare_folder(loaded.run):
        sys.stderr.write(f"megatron-rl train: resumed with a changed setting: {change}\n")
    command = ["megatron_rl", "train", *words]
    return LocalRanks(command, plan.layout.ranks, loaded.run.train.step_timeout_seconds).run()


def _print_warnings(plan: RunPlan) -> None:
    for warning in plan.warnings:
        sys.stderr.write(f"megatron-rl train: warning: {warning}\n")
