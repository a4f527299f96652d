"""``megatron-rl replay``: a saved micro-batch once more, alone, on one rank or on the ranks of its run."""

import json
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from megatron_rl.config.schema import Parallel, Run
from megatron_rl.errors import DataError, TrainingError
from megatron_rl.launch.ranks import LocalRanks
from megatron_rl.train.nonfinite_dump import REPLAY_RUN, REPLAYED, on_saved_weights, saved_run


def replay(file: Path, same_layout: bool) -> int:
    """Print where the first value that is not finite comes up; return 1 if one does, 0 if all are finite.

    Raises:
        DataError: the file is not one that a run saved.
    """
    try:
        run, ranks, message = saved_run(file)
    except (OSError, KeyError, SafetensorError) as error:
        raise DataError(
            f"{file} is no micro-batch that a run saved: {error}; give RUN/nonfinite/row.safetensors"
        ) from error
    run, ranks = (run, ranks) if same_layout else (one_rank(run), 1)
    run = on_saved_weights(run, file)
    sys.stdout.write(f"then: {message}\n")
    with tempfile.TemporaryDirectory(prefix="megatron-rl-replay-") as place:
        (Path(place) / REPLAY_RUN).write_text(run.model_dump_json(), encoding="utf-8")
        code = LocalRanks(["replay-rank", str(file.resolve()), place], ranks).run()
        if code or not (Path(place) / REPLAYED).exists():
            raise TrainingError(f"the ranks of the replay ended with exit code {code}; their message is above")
        stages = json.loads((Path(place) / REPLAYED).read_text(encoding="utf-8"))
    for stage in stages:
        sys.stdout.write(f"now:  {stage['stage']}: {stage['found'] or 'finite'}\n")
    return 1 if stages[-1]["found"] else 0


def one_rank(run: Run) -> Run:
    """Return the run on a single rank."""
    parallel = Parallel(distributed_optimizer=run.parallel.distributed_optimizer, ranks=1)
    return run.model_copy(update={"parallel": parallel})
