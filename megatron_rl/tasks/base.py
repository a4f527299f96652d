"""What a task is: prompts by position, and a verifier."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from megatron_rl.data.prompts import PromptSource
from megatron_rl.data.types import Prompt, Response

Split = Literal["train", "heldout"]


Failure = Literal["", "declined", "raised", "timed_out", "invalid", "environment"]
"""Why there is no score: the verifier returned None, raised, took too long, returned what is no finite number; or the
environment of the response failed. Empty where there is a score."""


@dataclass(frozen=True)
class Verdict:
    """What a verifier says about one response."""

    score: float | None
    """The reward; None if the verifier could not tell, which leaves the response out of its group's mean."""
    correct: bool
    """Whether the answer is right: what accuracy counts."""
    reason: str = ""
    """Why the answer is not right or not verified, for people who read ``rollouts.jsonl``."""
    failure: Failure = ""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Where there are several: each by its name, without its weight; ``score`` is their weighted sum."""
    answer: str | None = None
    """What the response was taken to answer, for majority votes; None if it gave no answer, or nobody can say."""


def unverified(failure: Failure, reason: str) -> Verdict:
    """Return the verdict of a verifier that gave none."""
    return Verdict(None, False, reason, failure)


class Task(Protocol):
    """A source of prompts and the judge of the responses to them."""

    def prompts(self, split: Split, seed: int) -> PromptSource:
        """Return the prompts of a split by position; a pure function of the seed."""
        ...

    def verify(self, prompt: Prompt, response: Response) -> Verdict:
        """Judge one response; must not depend on anything but its arguments."""
        ...


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that tasks use."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """Return the text of a conversation, ready for the assistant's turn."""
        ...
