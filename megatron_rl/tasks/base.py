"""What a task is: prompts by position, and a verifier."""

from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_rl.data.prompts import PromptSource
from megatron_rl.data.types import Prompt, Response

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Verdict:
    """What a verifier says about one response."""

    score: float | None
    """The reward; None if the verifier could not tell, which leaves the response out of its group's mean."""
    correct: bool
    """Whether the answer is right: what accuracy counts."""
    reason: str = ""
    """Why the answer is not right or not verified, for people who read ``rollouts.jsonl``."""


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
