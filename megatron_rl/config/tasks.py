"""The task sections of the configuration: where prompts come from and who judges the answers."""

import re
from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from megatron_rl.config.section import InputPath, PathToFunction, Section

Option = bool | int | float | str | list[bool | int | float | str]
"""A value that is handed on as it is."""

S = TypeVar("S", "JsonlTask", "ReasoningGymTask")


def _system_prompt_has_a_template(task: S) -> S:
    if task.system_prompt and not task.chat_template:
        raise ValueError("system_prompt is set but chat_template is off; set task.chat_template = true")
    return task


class ChainedArithmeticTask(Section):
    """Sums to do from left to right, modulo 10; made on the fly, with a held-out split."""

    name: Literal["chained_arithmetic"] = "chained_arithmetic"
    min_operations: Annotated[int, Field(ge=1, le=9)] = 3
    """Fewest operations of an expression."""
    max_operations: Annotated[int, Field(ge=1, le=9)] = 5
    """Most operations of an expression."""

    @model_validator(mode="after")
    def _ordered(self) -> "ChainedArithmeticTask":
        if self.min_operations > self.max_operations:
            raise ValueError(
                f"min_operations {self.min_operations} is above max_operations {self.max_operations}; swap them"
            )
        return self


class JsonlTask(Section):
    """Prompts and answers from files: one JSON object a line, Parquet, or a folder of ``Dataset.save_to_disk``."""

    name: Literal["jsonl", "parquet", "datasets"] = "jsonl"
    path: InputPath
    """The training file; of Parquet also a folder or a pattern such as ``data/train-*.parquet``."""
    heldout_path: InputPath | None = None
    """The file for evaluation; without a value ``heldout_fraction`` of the training file is kept for it."""
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the lines, chosen by a hash of the prompt, that is never trained on; unused with ``heldout_path``."""
    prompt_field: str = "prompt"
    """Name of the field with the question: a text, or with ``chat_template`` also a list of turns."""
    answer_field: str = "answer"
    """Name of the field with the answer; ``a.b`` is b within a."""
    verifier: PathToFunction = "exact"
    """``exact``, ``number``, ``regex`` (the answer is the pattern), ``math`` (needs math-verify), ``code`` (the answer
    holds tests), ``path/to/file.py:function``, or the URL of a server: docs/tasks.md."""
    chat_template: bool = False
    """Send the prompt as a user's turn through the tokenizer's chat template."""
    system_prompt: str = ""
    """System turn before the prompt; only with ``chat_template``."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 2048
    """Longer prompts are left out, and counted."""

    _checked = model_validator(mode="after")(_system_prompt_has_a_template)


class Share(Section):
    """One task of a mixture."""

    dataset: str = ""
    """Name of the reasoning-gym task; without a value the key of the table."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the prompts, relative to the other weights."""
    level: Annotated[int, Field(ge=0)] | None = None
    """Level of the task's curriculum, 0 the easiest; without a value the task's own defaults."""
    options: dict[str, Option] = Field(default_factory=dict)
    """Fields of the task's configuration, as in reasoning-gym; stronger than ``level``."""


class ReasoningGymTask(Section):
    """Tasks that reasoning-gym makes and scores, one or a mixture; needs the package reasoning-gym."""

    name: Literal["reasoning_gym"] = "reasoning_gym"
    mixture: dict[str, Share]
    """A table for each task: ``chain_sum = {}``, or a name of yours with ``dataset``; inside: ``weight``, ``level`` of
    its curriculum, ``options``."""
    extract: Literal["tag", "boxed", "number", "last_line", "whole"] = "tag"
    """What of a response is scored: the last ``<answer>...</answer>``, the last ``\\boxed{...}``, the last number, the
    last line that is not empty, or everything."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.125
    """Share of the questions, chosen by a hash of their text, that is never trained on."""
    chat_template: bool = False
    """Send the question as a user's turn through the tokenizer's chat template."""
    system_prompt: str = ""
    """System turn before the question; only with ``chat_template``."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 2048
    """Longer questions are replaced by others, and counted."""

    _checked = model_validator(mode="after")(_system_prompt_has_a_template)

    @model_validator(mode="after")
    def _something_to_do(self) -> "ReasoningGymTask":
        if not self.mixture:
            raise ValueError("mixture is empty; write [task.mixture.chain_sum], or another task of reasoning-gym")
        return self


AnyTask = ChainedArithmeticTask | JsonlTask | ReasoningGymTask


class Environment(Section):
    """What answers the model between its turns: responses of several turns, with tools or without."""

    name: PathToFunction = ""
    """``calculator``, or ``path/to/file.py:Class``; none without a value. A turn ends where sampling does: at the
    end-of-sequence token or one of ``rollout.sampling.stop_token_ids``."""
    role: str = ""
    """Role in the chat template of what the environment says, such as ``tool`` or ``user``; without a value it is put
    in as it is."""
    max_turns: Annotated[int, Field(ge=1)] = 8
    """Turns of the model in a response; one that wants more is truncated."""


class Reward(Section):
    """What a response earns: the task's own score, and what is added to it."""

    weights: dict[str, float] = Field(default_factory=dict)
    """Weight of each reward by its name, ``task``, ``format``, ``overlong`` or one of ``verifiers``; 1 if not given."""
    verifiers: dict[str, PathToFunction] = Field(default_factory=dict)
    """More rewards: names of yours, each with a verifier as in ``task.verifier``."""
    format: str = ""
    """The reward ``format``: 1 if the whole response matches this regular expression, 0 if not. ``think`` stands for
    ``<think>...</think><answer>...</answer>``."""
    overlong_tokens: Annotated[int, Field(ge=0)] = 0
    """The reward ``overlong``, DAPO's: 0, over the last so many of ``max_new_tokens`` linearly down to -1; 0: none."""
    workers: Annotated[int, Field(ge=1)] = 2
    """Processes that verify, beside sampling and training."""
    seconds: Annotated[float, Field(gt=0)] = 10.0
    """A response that takes longer to verify is unverified, and the process that hangs is ended."""
    http_batch: Annotated[int, Field(ge=1, le=4096)] = 1
    """Responses that a verifier behind HTTP is asked about at once, at most; above 1 with lists: docs/tasks.md."""
    allow_code: bool = False
    """Let the verifier ``code`` run what the model wrote. Its sandbox has limits: docs/tasks.md."""

    @model_validator(mode="after")
    def _names(self) -> "Reward":
        for taken in {"task", "format", "overlong"} & self.verifiers.keys():
            raise ValueError(f"verifiers.{taken}: the name is taken; choose another one")
        known = self.names
        for name in self.weights:
            if name not in known:
                raise ValueError(f"weights.{name}: there is no such reward; there are {', '.join(known)}")
        try:
            re.compile(self.format)
        except re.error as error:
            raise ValueError(f"format is not a regular expression: {error}") from error
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """All rewards that are given."""
        more = [name for name, on in (("format", self.format), ("overlong", self.overlong_tokens)) if on]
        return ("task", *self.verifiers, *more)

    @property
    def weights_in_order(self) -> tuple[float, ...]:
        """The weights of ``names``."""
        return tuple(self.weights.get(name, 1.0) for name in self.names)
