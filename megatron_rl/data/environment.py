"""What answers the model between its turns: a tool, a game, a user."""

from collections.abc import Sequence
from typing import Protocol

from megatron_rl.data.types import Prompt


class Environment(Protocol):
    """The world of one response. There is a new one for each, so it may keep a state."""

    def reset(self, prompt: Prompt) -> None:
        """Begin: the model is about to answer this prompt."""
        ...

    def step(self, turn: str) -> str | Sequence[int] | None:
        """Return what the model reads next, after this turn of its own, as text or as token ids; None: it is done.

        ``turn`` is decoded without special tokens. It must not depend on anything but the prompt and the turns.
        """
        ...
