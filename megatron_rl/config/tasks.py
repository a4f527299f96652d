"""Configuration sections of tasks, environments and rewards."""

import re
from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from megatron_rl.config.section import InputPath, PathToFunction, Section

Option = bool | int | float | str | list[bool | int | float | str]
"""An option value that is passed through."""

S = TypeVar("S", "JsonlTask", "ReasoningGymTask")


def _check_template_options(task: S) -> S:
    for name in ("system_prompt", "template", "tools"):
        if getattr(task, name) and not task.chat_template:
            raise ValueError(f"{name} is set but chat_template is off; set task.chat_template = true")
    return task


class ChainedArithmeticTask(Section):
    """Sums evaluated from left to right, modulo 10; generated, with a held-out split."""

    name: Literal["chained_arithmetic"] = "chained_arithmetic"
    min_operations: Annotated[int, Field(ge=1, le=9)] = 3
    """Minimum operations per expression."""
    max_operations: Annotated[int, Field(ge=1, le=9)] = 5
    """Maximum operations per expression."""

    @model_validator(mode="after")
    def _check_order(self) -> "ChainedArithmeticTask":
        if self.min_operations > self.max_operations:
            raise ValueError(
                f"min_operations {self.min_operations} is above max_operations {self.max_operations}; swap them"
            )
        return self


class JsonlTask(Section):
    """Prompts and answers from JSON lines, Parquet files, or a folder of ``Dataset.save_to_disk``."""

    name: Literal["jsonl", "parquet", "datasets"] = "jsonl"
    path: InputPath
    """Training file; for Parquet also a folder or a pattern such as ``data/train-*.parquet``."""
    heldout_path: InputPath | None = None
    """Evaluation file; default: ``heldout_fraction`` of the training file."""
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Fraction of prompts held out for evaluation, selected by hash."""
    prompt_field: str = "prompt"
    """Field of the prompt: a text, or with ``chat_template`` also a list of turns."""
    answer_field: str = "answer"
    """Field of the answer; ``a.b`` is field b of a."""
    verifier: PathToFunction = "exact"
    """``exact``, ``number``, ``regex`` (the answer is the pattern), ``math`` (needs math-verify), ``code`` (the answer
    contains tests), ``path/to/file.py:function``, or the URL of a server; see docs/tasks.md."""
    chat_template: bool = False
    """Format the prompt as a user turn with the tokenizer's chat template."""
    system_prompt: str = ""
    """System turn; needs ``chat_template``."""
    template: dict[str, Option] = Field(default_factory=dict)
    """Variables of the chat template, such as ``{ enable_thinking = false }``; needs ``chat_template``."""
    tools: InputPath | None = None
    """JSON file with the schemas of the tools that the chat template shows; needs ``chat_template``."""
    prefill: str = ""
    """Beginning of every response; part of the prompt, and not trained."""
    continue_last_turn: bool = False
    """Responses continue a conversation whose last turn is the assistant's; default: such rows are refused."""
    escape_control_tokens: bool | None = None
    """Encode special tokens that occur in the data as characters; default: with ``chat_template``."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 2048
    """Maximum prompt length, in tokens; longer prompts are skipped and counted."""

    _checked = model_validator(mode="after")(_check_template_options)


class MixtureTask(Section):
    """One reasoning-gym task of a mixture."""

    dataset: str = ""
    """Name of the reasoning-gym task; default: the key of the table."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Relative sampling weight."""
    level: Annotated[int, Field(ge=0)] | None = None
    """Curriculum level, from 0; default: the task's own settings."""
    options: dict[str, Option] = Field(default_factory=dict)
    """Fields of reasoning-gym's task configuration, overriding ``level``."""


class ReasoningGymTask(Section):
    """One reasoning-gym task or a mixture; needs the package reasoning-gym."""

    name: Literal["reasoning_gym"] = "reasoning_gym"
    mixture: dict[str, MixtureTask]
    """One table per task, ``chain_sum = {}`` or any name with ``dataset``; keys: ``weight``, ``level``, ``options``."""
    extract: Literal["tag", "boxed", "number", "last_line", "whole"] = "tag"
    """Scored part of a response: the last ``<answer>...</answer>``, the last ``\\boxed{...}``, the last number, the
    last non-empty line, or the whole response."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.125
    """Fraction of questions held out for evaluation, selected by hash."""
    chat_template: bool = False
    """Format the question as a user turn with the tokenizer's chat template."""
    system_prompt: str = ""
    """System turn; needs ``chat_template``."""
    template: dict[str, Option] = Field(default_factory=dict)
    """Variables of the chat template, such as ``{ enable_thinking = false }``; needs ``chat_template``."""
    tools: InputPath | None = None
    """JSON file with the schemas of the tools that the chat template shows; needs ``chat_template``."""
    prefill: str = ""
    """Beginning of every response; part of the prompt, and not trained."""
    continue_last_turn: bool = False
    """Responses continue a conversation whose last turn is the assistant's; default: such rows are refused."""
    escape_control_tokens: bool | None = None
    """Encode special tokens that occur in the data as characters; default: with ``chat_template``."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 2048
    """Maximum prompt length, in tokens; longer questions are replaced and counted."""

    _checked = model_validator(mode="after")(_check_template_options)

    @model_validator(mode="after")
    def _check_mixture(self) -> "ReasoningGymTask":
        if not self.mixture:
            raise ValueError(
                "mixture is empty; write [task.mixture.chain_sum], or the table of another reasoning-gym task"
            )
        return self


AnyTask = ChainedArithmeticTask | JsonlTask | ReasoningGymTask


class EnvironmentConfig(Section):
    """The environment of multi-turn responses."""

    name: PathToFunction = ""
    """``calculator`` or ``path/to/file.py:Class``; empty for single-turn responses. A turn ends at the end-of-sequence
    token or at one of ``rollout.sampling.stop_token_ids``."""
    role: str = ""
    """Chat-template role of the environment's messages, such as ``tool``; empty: insert them without a template."""
    max_turns: Annotated[int, Field(ge=1)] = 8
    """Maximum model turns per response; longer responses are truncated."""


class Reward(Section):
    """Reward terms and their weights."""

    weights: dict[str, float] = Field(default_factory=dict)
    """Weights of the rewards ``task``, ``format``, ``overlong`` and those of ``verifiers``; default 1 each."""
    verifiers: dict[str, PathToFunction] = Field(default_factory=dict)
    """More rewards by name, each with a verifier as in ``task.verifier``."""
    format: str = ""
    """Regular expression of the reward ``format``: 1 if the whole response matches, else 0. ``think`` means
    ``<think>...</think><answer>...</answer>``."""
    overlong_tokens: Annotated[int, Field(ge=0)] = 0
    """Length of DAPO's ``overlong`` penalty, which falls linearly from 0 to -1 over the last so many of
    ``max_new_tokens``; 0: none."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 2
    """Verifier processes, per verifier host with ``registry``."""
    registry: InputPath | None = None
    """Addresses of verifier hosts: a folder where ``megatron_rl.tasks.verifier_host`` registers, or a file with one
    ``host:port`` per line. Unset: verify on the controller's host."""
    seconds: Annotated[float, Field(gt=0)] = 10.0
    """Time limit per verification; the response is then unverified and the process is restarted."""
    http_batch: Annotated[int, Field(ge=1, le=4096)] = 1
    """Maximum responses per request to an HTTP verifier; above 1 the request has lists."""
    allow_code: bool = False
    """Allow the verifier ``code`` to run generated programs; docs/tasks.md describes its sandbox."""

    @model_validator(mode="after")
    def _check_names(self) -> "Reward":
        for reserved in {"task", "format", "overlong"} & self.verifiers.keys():
            raise ValueError(f"verifiers.{reserved}: the name is reserved; choose another one")
        known = self.names
        for name in self.weights:
            if name not in known:
                raise ValueError(f"weights.{name}: no such reward; one of {', '.join(known)}")
        try:
            re.compile(self.format)
        except re.error as error:
            raise ValueError(f"format is not a regular expression: {error}") from error
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all configured rewards."""
        others = [name for name, on in (("format", self.format), ("overlong", self.overlong_tokens)) if on]
        return ("task", *self.verifiers, *others)

    @property
    def weights_in_order(self) -> tuple[float, ...]:
        """Weights in the order of ``names``."""
        return tuple(self.weights.get(name, 1.0) for name in self.names)
