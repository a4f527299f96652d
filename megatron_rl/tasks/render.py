"""Conversion of a question to the text and token ids of a prompt."""

from typing import Protocol

from megatron_rl.tasks.base import Tokenizer


class ChatOptions(Protocol):
    """The options of a task that control how prompts are rendered."""

    @property
    def chat_template(self) -> bool:
        """Whether the question becomes a user turn of the chat template."""
        ...

    @property
    def system_prompt(self) -> str:
        """Content of the system turn before the question; empty for none."""
        ...


def render(
    question: str | list[dict[str, str]], options: ChatOptions, tokenizer: Tokenizer
) -> tuple[str, tuple[int, ...]]:
    """Return the text of a prompt and its token ids: the question unchanged, or formatted by the chat template.

    A question that is a conversation always goes through the chat template.
    """
    if isinstance(question, str) and not options.chat_template:
        return question, tuple(tokenizer.encode(question, add_special_tokens=True))
    turns = [{"role": "system", "content": options.system_prompt}] if options.system_prompt else []
    turns += [{"role": "user", "content": question}] if isinstance(question, str) else question
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text, tuple(tokenizer.encode(text, add_special_tokens=False))
