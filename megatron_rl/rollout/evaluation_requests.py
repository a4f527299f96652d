"""The questions of an evaluation: which held-out prompts, drawn how, from which seeds.

A run asks them on its way, and ``megatron-rl eval`` asks its checkpoints the same: same weights, same answers.
"""

from megatron_rl.config.schema import Run, Sampling
from megatron_rl.data.prompts import first_prompts
from megatron_rl.data.types import Prompt
from megatron_rl.tasks.base import Task

EVALUATION = 0x6576616C
"""Keeps the sampling seeds of an evaluation apart from those of training."""

Question = tuple[tuple[Prompt, ...], int, Sampling, tuple[int, int, int]]
"""Prompts, responses to each, how they are drawn, and seeds: the first arguments of the fleet's methods."""


def heldout_prompts(run: Run, task: Task) -> tuple[Prompt, ...]:
    """Return the first ``evaluate.prompts`` held-out prompts, or all there are."""
    return first_prompts(task.prompts("heldout", run.train.seed), run.evaluate.prompts)


def question(run: Run, prompts: tuple[Prompt, ...], step: int) -> Question:
    """Return what is asked of the weights after ``step`` rollout batches."""
    # temperature 0 is greedy: a value that training itself must not have
    sampling = run.rollout.sampling.model_copy(update={"temperature": run.evaluate.temperature})
    return prompts, run.evaluate.samples, sampling, (run.train.seed, step, EVALUATION)
