"""Tasks: where prompts come from and how answers are verified."""

from collections.abc import Iterator

from megatron_rl.config.tasks import AnyTask, ChainedArithmeticTask, Environment, JsonlTask, Reward
from megatron_rl.errors import ConfigError
from megatron_rl.tasks.base import Task, Tokenizer, Verdict
from megatron_rl.tasks.chained_arithmetic import ChainedArithmetic
from megatron_rl.tasks.environments import find_environment
from megatron_rl.tasks.jsonl import Jsonl, check_files
from megatron_rl.tasks.reasoning_gym import ReasoningGym, check_gym
from megatron_rl.tasks.reward import check_verifiers

__all__ = ["Task", "Tokenizer", "Verdict", "check_task", "make_task"]


def make_task(options: AnyTask, tokenizer: Tokenizer) -> Task:
    """Return the task that a configuration names; reads and checks its files."""
    if isinstance(options, ChainedArithmeticTask):
        return ChainedArithmetic(options, tokenizer)
    if isinstance(options, JsonlTask):
        return Jsonl(options, tokenizer)
    return ReasoningGym(options, tokenizer)


def check_task(options: AnyTask, reward: Reward, environment: Environment) -> Iterator[str]:
    """Yield what is wrong with a task, its rewards and its environment, without a tokenizer: files, packages, names."""
    if environment.name:
        try:
            find_environment(environment.name)
        except ConfigError as error:
            yield str(error)
    own = {"task.verifier": options.verifier} if isinstance(options, JsonlTask) else {}
    yield from check_verifiers(own | {f"reward.verifiers.{name}": v for name, v in reward.verifiers.items()}, reward)
    if isinstance(options, JsonlTask):
        yield from check_files(options)
    elif not isinstance(options, ChainedArithmeticTask):
        yield from check_gym(options)
