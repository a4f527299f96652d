"""``megatron-rl debug-nonfinite``: runs a saved micro-batch again, on one rank or in the layout of its run."""

import json
import sys
import tempfile
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError

from megatron_rl.config.schema import Parallel, Run
from megatron_rl.errors import DataError, TrainingError
from megatron_rl.launch.ranks import LocalRanks
from megatron_rl.observability.file_names import NONFINITE
from megatron_rl.train.nonfinite_dump import DEBUG_RESULT, DEBUG_RUN, ROW, on_saved_weights, saved_run

ADVICE = "give the file that train named when it stopped: RUN/nonfinite/row.safetensors"


def debug_nonfinite(file: Path, same_layout: bool) -> int:
    """Print where the first NaN or inf appears; return 1 if one does, 0 if all values are finite.

    Args:
        file: ``RUN/nonfinite/row.safetensors``.
        same_layout: use the layout of the run instead of one rank.

    Raises:
        DataError: a run did not save the file.
        TrainingError: the ranks failed.
    """
    run, ranks, message = _read(file)
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


def _read(file: Path) -> tuple[Run, int, str]:
    """Return the run that saved the file, its number of ranks, and the message of its error."""
    if not file.is_file():
        found = sorted({*file.glob(f"**/{NONFINITE}/{ROW}"), *file.glob(ROW)}) if file.is_dir() else []
        problem = f"{file} is a folder" if file.is_dir() else f"no such file: {file}"
        advice = f"did you mean {found[0]}?" if found else ADVICE
        raise DataError(f"{problem}; {advice}")
    try:
        return saved_run(file)
    except SafetensorError as error:
        raise DataError(f"{file} is not a safetensors file ({error}); {ADVICE}") from error
    except KeyError as error:
        raise DataError(f"{file} is not a micro-batch that a run saved: its header has no {error}; {ADVICE}") from error
    except ValidationError as error:
        raise DataError(
            f"{file} was saved by another version of megatron-rl, whose settings differ: {error.error_count()}"
            " do not fit; use that version"
        ) from error


def one_rank(run: Run) -> Run:
    """Return the run on a single rank."""
    parallel = Parallel(distributed_optimizer=run.parallel.distributed_optimizer, ranks=1)
    return run.model_copy(update={"parallel": parallel})
