"""Finds the checkpoint that a run continues from, and checks it before any rank starts."""

from pathlib import Path

from megatron_rl.config.schema import Run
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.sharded_files import check_model
from megatron_rl.models.training_checkpoint import open_sharded_state, read_meta, step_of, valid_checkpoints


def checkpoint_folder(run: Run) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(run.log.path) / "checkpoints"


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after this many rollout batches."""
    return f"step_{step:08}"


def newest_checkpoint(run: Run) -> Path | None:
    """Return the newest complete checkpoint; None if there is none."""
    return next(reversed(valid_checkpoints(checkpoint_folder(run))), None)


def layout_record(run: Run, ranks: int) -> dict[str, int | str | None]:
    """Return what must be equal for a bit-equal continuation: sizes of the mesh axes, number of ranks, precision."""
    return run.parallel.model_dump() | {"ranks": ranks, "dtype": run.model.dtype}


def check_resumable(run: Run) -> str:
    """Check the newest checkpoint if the run resumes; a checkpoint of any layout is accepted.

    Returns:
        where the run begins, as a sentence; empty if it does not resume.

    Raises:
        DataError: a file is missing or incomplete, or the checkpoint is of another model.
    """
    if not run.train.resume:
        return ""
    newest = newest_checkpoint(run)
    if newest is None:
        return f"train.resume = true, but there is no checkpoint in {checkpoint_folder(run)}: starting at step 0"
    meta = read_meta(newest)
    check_model(open_sharded_state(newest, meta), family_of(read_hf_config(Path(run.model.path))))
    return describe_start(newest, meta.step, run.train.steps)


def resumed_step(run: Run) -> int:
    """Return the number of steps after which the run begins; 0 if it does not resume."""
    newest = newest_checkpoint(run) if run.train.resume else None
    return 0 if newest is None else step_of(newest)


def describe_start(checkpoint: Path, step: int, steps: int) -> str:
    """Return where a run of this many steps begins that resumes from a checkpoint written after ``step`` of them."""
    if step < steps:
        return f"resuming at step {step} from {checkpoint}"
    return f"{checkpoint} has all {steps} steps (train.steps); to train on, set train.steps above {step}"
