"""``megatron-rl debug-nonfinite``: runs a saved micro-batch again, on one rank or in the layout of its run."""

import json
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from megatron_rl.config.schema import Parallel, Run
from megatron_rl.errors import DataError, TrainingError
from megatron_rl.launch.ranks import LocalRanks
from megatron_rl.train.nonfinite_dump import DEBUG_RESULT, DEBUG_RUN, on_saved_weights, saved_run


def debug_nonfinite(file: Path, same_layout: bool) -> int:
    """Print where the first NaN or inf appears; return 1 if one does, 0 if all values are finite.

    Args:
        file: ``RUN/nonfinite/row.safetensors``.
        same_layout: use the layout of the run instead of one rank.

    Raises:
        DataError: a run did not save the file.
        TrainingError: the ranks failed.
    """
    try:
        run, ranks, message = saved_run(file)
    except (OSError, KeyError, SafetensorError) as error:
        raise DataError(
            f"{file} is not a micro-batch that a run saved: {error}; give RUN/nonfinite/row.safetensors"
        ) from error
    run, ranks = (run, ranks) if same_layout else (one_rank(run), 1)
    run = on_saved_weights(run, file)
    sys.stdout.write(f"then: {message}\n")
    with tempfile.TemporaryDirectory(prefix="megatron-rl-debug-") as name:
        folder = Path(name)
        (folder / DEBUG_RUN).write_text(run.model_dump_json(), encoding="utf-8")
        code = LocalRanks(["megatron_rl.launch.debug_rank", str(file.resolve()), name], ranks).run()
        if code or not (folder / DEBUG_RESULT).exists():
            raise TrainingError(f"the ranks ended with exit code {code}; their message is above")
        stages = json.loads((folder / DEBUG_RESULT).read_text(encoding="utf-8"))
    for stage in stages:
        sys.stdout.write(f"now:  {stage['stage']}: {stage['found'] or 'finite'}\n")
    return 1 if stages[-1]["found"] else 0


def one_rank(run: Run) -> Run:
    """Return the run on a single rank."""
    parallel = Parallel(distributed_optimizer=run.parallel.distributed_optimizer, ranks=1)
    return run.model_copy(update={"parallel": parallel})
