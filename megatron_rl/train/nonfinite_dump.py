"""Saves the micro-batch of a step that computed NaN or inf, and runs it again on one rank.

RUN/nonfinite/row.safetensors    the micro-batch with all columns; its header has the run, its ranks, the finding
              weights/           the weights that computed it, a Hugging Face checkpoint
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from megatron_rl.algorithms.loss import make_loss
from megatron_rl.config.load import to_json
from megatron_rl.config.schema import Run
from megatron_rl.data.files import load_batch, read_metadata, save_batch
from megatron_rl.data.types import Batch
from megatron_rl.distributed.mesh import start_world
from megatron_rl.errors import TrainingError
from megatron_rl.observability.file_names import NONFINITE
from megatron_rl.policy.engine import Policy
from megatron_rl.policy.nonfinite import NonFiniteError
from megatron_rl.train.export import export_hf
from megatron_rl.util.atomic import replace_text

ROW, WEIGHTS = "row.safetensors", "weights"
DEBUG_RUN, DEBUG_RESULT = "run.json", "result.json"
"""Files that the ranks of ``megatron-rl debug-nonfinite`` read and write."""


@contextmanager
def nonfinite_dump(run: Run, policy: Policy, sample_id: Callable[[int], str | None]) -> Iterator[None]:
    """Save the micro-batch and the weights if the ``with`` block raises ``NonFiniteError``.

    Args:
        run: the configuration.
        policy: the policy that computed the step.
        sample_id: returns the id of a sample of the step by its index; called on the main rank.

    Raises:
        TrainingError: on the main rank the error with the sample's id and the file, on the others a short message.
    """
    try:
        yield
    except NonFiniteError as error:
        folder = Path(run.log.path) / NONFINITE
        folder.mkdir(parents=True, exist_ok=True)
        export_hf(policy, run, folder / WEIGHTS)
        if not policy.mesh.world.is_main:
            dist.barrier()
            raise TrainingError("stopped by NaN or inf; the main rank reports where") from error
        save_row(error, run, policy.mesh.world.size, folder / ROW)
        dist.barrier()
        sample = error.finding.sample
        name = "" if sample is None else f"\n  sample {sample} is {sample_id(sample)}"
        file = folder / ROW
        raise TrainingError(f"{error}{name}\n  run it again alone: megatron-rl debug-nonfinite {file}") from error


def save_row(error: NonFiniteError, run: Run, ranks: int, file: Path) -> None:
    """Write the micro-batch, with the run, the finding and the message in the header."""
    header = {"run": to_json(run), "ranks": str(ranks), "finding": json.dumps(asdict(error.finding))}
    save_batch(error.batch, file, {**header, "message": str(error)})


def debug_rank(file: Path, folder: Path) -> int:
    """Compute log-probs, loss and gradient of a saved micro-batch; the main rank writes the findings to ``folder``."""
    run = Run.model_validate_json((folder / DEBUG_RUN).read_text(encoding="utf-8"))
    world = start_world(run.train.step_timeout_seconds, run.train.deterministic)
    policy = Policy(run, world, total_updates=1)
    stages = [{"stage": stage, "found": found} for stage, found in _stages(policy, run, load_batch(file))]
    if world.is_main:
        replace_text(folder / DEBUG_RESULT, json.dumps(stages))
    dist.destroy_process_group()
    return 0


def _stages(policy: Policy, run: Run, batch: Batch) -> Iterator[tuple[str, str | None]]:
    """Yield each stage with its finding, up to the first stage with NaN or inf."""
    minibatch = policy.local_part(batch, in_one_row=True)
    try:
        policy.compute_logprobs(minibatch)
    except NonFiniteError as error:
        yield "score", error.finding.words()
        return
    yield "score", None
    if "weights_T" not in batch:
        return
    try:
        policy.forward_backward(minibatch, make_loss(run.objective, run.kl))
    except NonFiniteError as error:
        yield "loss and backward", error.finding.words()
        return
    yield "loss and backward", None


def saved_run(file: Path) -> tuple[Run, int, str]:
    """Return the run that saved a file, its number of ranks, and the message of its error."""
    header = read_metadata(file)
    return Run.model_validate_json(header["run"]), int(header["ranks"]), header["message"]


def on_saved_weights(run: Run, file: Path) -> Run:
    """Return the run with the weights that were saved with the file."""
    path = str(file.resolve().parent / WEIGHTS)
    return run.model_copy(update={"model": run.model.model_copy(update={"path": path})})
