"""Accuracy on held-out prompts: during a run, and the same requests for ``megatron-rl eval``.

The requests depend only on the configuration and the step, so the same weights give the same responses in both.
"""

from typing import Protocol

from megatron_rl.config.rollout import Sampling
from megatron_rl.config.schema import Run
from megatron_rl.data.prompts import first_prompts
from megatron_rl.data.types import Prompt
from megatron_rl.distributed.main_rank import main_rank
from megatron_rl.tasks.base import Task

EVALUATION = 0x6576616C
"""Part of the sampling seeds of evaluations, which makes them differ from those of training."""

EvaluationRequest = tuple[tuple[Prompt, ...], int, Sampling, tuple[int, int, int]]
"""Prompts, responses per prompt, sampling parameters and seed: the first arguments of ``Fleet.submit``."""


def heldout_prompts(run: Run, task: Task) -> tuple[Prompt, ...]:
    """Return the first ``evaluate.prompts`` held-out prompts, or all there are."""
    return first_prompts(task.prompts("heldout", run.train.seed), run.evaluate.prompts)


def evaluation_request(run: Run, prompts: tuple[Prompt, ...], step: int) -> EvaluationRequest:
    """Return the request that evaluates the weights after ``step`` rollout batches."""
    # Temperature 0 is greedy decoding, which the validation of training's own sampling refuses.
    sampling = run.rollout.sampling.model_copy(update={"temperature": run.evaluate.temperature, "keep_mask": False})
    return prompts, run.evaluate.samples, sampling, (run.train.seed, step, EVALUATION)


def evaluation_due(run: Run, step: int) -> bool:
    """Return whether ``evaluate.every`` asks for an evaluation before this step, or after the last one."""
    every = run.evaluate.every
    return every > 0 and (step % every == 0 or step == run.train.steps)


class Evaluator(Protocol):
    """Evaluates the weights that the fleet has; ``ControllerClient`` is one."""

    def evaluate(self, step: int) -> tuple[float, int] | None:
        """Return the accuracy and the number of prompts; None after a stop request."""
        ...

    def progress(self) -> int:
        """Return a number that changes while servers work or groups are verified. Callable in any thread."""
        ...


class Evaluation:
    """Evaluates the fleet's weights on held-out prompts. Every rank has one; the main rank's returns the result."""

    def __init__(self, run: Run, client: Evaluator | None) -> None:
        self._run, self._client = run, client

    def is_due(self, step: int) -> bool:
        """Return whether to evaluate before this step; the same on every rank."""
        return evaluation_due(self._run, step)

    def run(self, step: int) -> tuple[float, int] | None:
        """Return the accuracy and the number of prompts; None after a stop request, and on the other ranks."""
        if self._client is None:
            return None
        with main_rank().waits_for(f"the evaluation before step {step}", self._client.progress):
            return self._client.evaluate(step)
