"""Tasks: sources of prompts, and verifiers that score the responses."""

from collections.abc import Iterator

from megatron_rl.config.tasks import AnyTask, ChainedArithmeticTask, EnvironmentConfig, JsonlTask, Reward
from megatron_rl.errors import ConfigError
from megatron_rl.tasks.base import Task, Tokenizer, Verdict
from megatron_rl.tasks.chained_arithmetic import ChainedArithmetic
from megatron_rl.tasks.environments import find_environment
from megatron_rl.tasks.jsonl import Jsonl, check_files
from megatron_rl.tasks.reasoning_gym import ReasoningGym, check_gym
from megatron_rl.tasks.reward import check_verifiers

__all__ = ["Task", "Tokenizer", "Verdict", "check_task", "make_task"]


def make_task(options: AnyTask, tokenizer: Tokenizer) -> Task:
    """Return the task that a configuration names. Its prompt files are read and checked."""
    if isinstance(options, ChainedArithmeticTask):
        return ChainedArithmetic(options, tokenizer)
    if isinstance(options, JsonlTask):
        return Jsonl(options, tokenizer)
    return ReasoningGym(options, tokenizer)


def check_task(
    options: AnyTask, reward: Reward, environment: EnvironmentConfig, *, reads_files: bool = True
) -> Iterator[str]:
    """Yield the problems of a task, its rewards and its environment (files, packages, names). Needs no tokenizer.

    Without ``reads_files`` prompt files are left out, for callers that read them anyway (``sample_prompts``).
    """
    if environment.name:
        try:
            find_environment(environment.name)
        except ConfigError as error:
            yield str(error)
    names = {"task.verifier": options.verifier} if isinstance(options, JsonlTask) else {}
    names |= {f"reward.verifiers.{name}": verifier for name, verifier in reward.verifiers.items()}
    yield from check_verifiers(names, reward)
    if isinstance(options, JsonlTask):
        yield from check_files(options) if reads_files else ()
    elif not isinstance(options, ChainedArithmeticTask):
        yield from check_gym(options)
