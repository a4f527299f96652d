"""``megatron-rl train``: starts the trainer ranks on this machine, or is one rank if torchrun or srun started it."""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.distributed.ledger import record_collectives
from megatron_rl.distributed.mesh import rank_from_environment
from megatron_rl.launch.failures import reporting_failure
from megatron_rl.launch.planning.estimate import estimate_run
from megatron_rl.launch.planning.fit import describe_misfit, memory_fit
from megatron_rl.launch.planning.run_plan import RunPlan, make_plan
from megatron_rl.launch.quiet import quiet_upstream
from megatron_rl.launch.ranks import PREPARED, LocalRanks
from megatron_rl.launch.startup_lines import startup_lines
from megatron_rl.launch.versions import found_versions
from megatron_rl.observability.run_folder import prepare_folder
from megatron_rl.observability.run_lock import locked
from megatron_rl.train.resume import check_resumable, resumed_step
from megatron_rl.util.logs import StderrHandler, logging_to

log = logging.getLogger(__name__)


def main(loaded: Loaded[Run], words: Sequence[str]) -> int:
    """Train; return the exit code: 0 at the end, 130 after a stop request (resumable), 75 after a hang."""
    launched = rank_from_environment()
    level = logging.INFO if launched is None or launched[0] == 0 else logging.WARNING
    with logging_to(StderrHandler("megatron-rl train"), level):
        if launched is None:
            return _run_ranks(loaded, words)
        rank, size, _ = launched
        return _run_rank(loaded, rank, size)


def _run_ranks(loaded: Loaded[Run], words: Sequence[str]) -> int:
    plan = make_plan(loaded, inspected="sample")
    with locked(Path(loaded.run.log.path)):
        _prepare(loaded, plan, check_resumable(loaded.run))
        command = ["megatron_rl", "train", *words]
        return LocalRanks(command, plan.layout.ranks, loaded.run.train.step_timeout_seconds).run()


def _run_rank(loaded: Loaded[Run], rank: int, size: int) -> int:
    with ExitStack() as stack:
        if PREPARED not in os.environ:  # started by torchrun or srun, not by LocalRanks
            plan = make_plan(loaded, size, inspected="sample")
            resumed = check_resumable(loaded.run)
            if rank == 0:
                stack.enter_context(locked(Path(loaded.run.log.path)))
                _prepare(loaded, plan, resumed)
        quiet_upstream()
        record_collectives()
        with reporting_failure():
            from megatron_rl.train.rank import run_rank

            return run_rank(loaded)


def _prepare(loaded: Loaded[Run], plan: RunPlan, resumed: str) -> None:
    """Create the run folder, and log warnings, what the run is, where it begins, and the settings that changed."""
    estimate = estimate_run(loaded, plan.layout.ranks)
    fit = None if estimate is None else memory_fit(loaded, estimate)
    misfit = [] if fit is None or fit.fits else [describe_misfit(fit)]  # a plan, not a measurement: the run may try
    for warning in (*misfit, *plan.warnings):
        log.warning(warning)
    versions = found_versions()
    changes = prepare_folder(loaded.run, versions, resumed_step(loaded.run))
    log.info("\n  ".join(startup_lines(loaded.run, plan.layout, versions)))
    if resumed:
        log.info(resumed)
    if changes:
        log.info("\n  ".join(["resumed with changed settings:", *changes]))
