"""The interface of a task: prompts by position, and a verifier."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from megatron_rl.data.prompts import PromptSource
from megatron_rl.data.types import Prompt, Response, fold_seed

Split = Literal["train", "heldout"]


Failure = Literal["", "declined", "raised", "timed_out", "invalid", "environment"]
"""Why a response has no score: the verifier returned None, raised, timed out or returned something other than a finite
number, or the environment of the response failed. Empty if there is a score."""


@dataclass(frozen=True)
class Verdict:
    """The result of verifying one response."""

    score: float | None
    """The reward. None if it is unknown: the response is then left out of its group's mean."""
    correct: bool
    """Whether the answer is right, for accuracy."""
    reason: str = ""
    """Why the answer is wrong or not verified, for readers of ``rollouts.jsonl``."""
    failure: Failure = ""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """The unweighted rewards by name, if there are several; ``score`` is their weighted sum."""
    answer: str | None = None
    """The answer that was extracted from the response, for majority votes; None if there is none or it is unknown."""

    def __post_init__(self) -> None:
        """Replace characters that cannot be written to a file, such as half of a surrogate pair."""
        for name in ("reason", "answer"):
            text = getattr(self, name)
            if isinstance(text, str):
                object.__setattr__(self, name, text.encode(errors="replace").decode())


def unverified(failure: Failure, reason: str) -> Verdict:
    """Return the verdict of a response that could not be verified."""
    return Verdict(None, False, reason, failure)


def unfinished(response: Response) -> Verdict | None:
    """Return the verdict "wrong" for a response that did not end by itself; None for one that did."""
    if response.finish_reason == "stop":
        return None
    return Verdict(0.0, False, f"did not end: {response.finish_reason}")


def text_hash(text: str) -> int:
    """Return a 64-bit hash of a text that is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def in_heldout_split(text: str, heldout_fraction: float) -> bool:
    """Return whether a question belongs to the held-out split. It depends on the text only, never on a seed."""
    return fold_seed((text_hash(text),)) / 2**63 < heldout_fraction


class Task(Protocol):
    """A source of prompts, and a verifier of the responses to them."""

    def prompts(self, split: Split, seed: int) -> PromptSource:
        """Return the prompts of a split by position, as a pure function of the seed."""
        ...

    def verify(self, prompt: Prompt, response: Response) -> Verdict:
        """Verify one response. The result must depend on the arguments only."""
        ...


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that tasks use."""

    def encode(self, text: str, *, add_special_tokens: bool, **options: bool) -> list[int]:
        """Return the token ids of a text. With ``split_special_tokens`` special tokens are encoded as characters."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool, **variables: object
    ) -> str:
        """Return the text of a conversation, ending where the assistant's turn begins."""
        ...
