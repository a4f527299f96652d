"""Tasks: where prompts come from and how answers are verified."""

from megatron_rl.config.schema import AnyTask, ChainedArithmeticTask
from megatron_rl.tasks.base import Task, Tokenizer, Verdict
from megatron_rl.tasks.chained_arithmetic import ChainedArithmetic
from megatron_rl.tasks.jsonl import Jsonl

__all__ = ["Task", "Tokenizer", "Verdict", "make_task"]


def make_task(options: AnyTask, tokenizer: Tokenizer) -> Task:
    """Return the task that a configuration names; reads and checks its files."""
    if isinstance(options, ChainedArithmeticTask):
        return ChainedArithmetic(options, tokenizer)
    return Jsonl(options, tokenizer)
