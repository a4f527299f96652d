"""Interface of environments, which answer the model between its turns: a tool, a game or a simulated user."""

from collections.abc import Sequence
from typing import Protocol

from megatron_rl.data.types import Prompt


class Environment(Protocol):
    """An environment for one response. A new instance is created for each response, so it may have state."""

    def reset(self, prompt: Prompt) -> None:
        """Start an episode for ``prompt``."""
        ...

    def step(self, turn: str) -> str | Sequence[int] | None:
        """Return the observation after a turn of the model, as text or token ids; None ends the response.

        The result must depend only on the prompt and the turns so far.

        Args:
            turn: the text of the model's turn, without special tokens.
        """
        ...
