"""From a question to the text and the token ids that an engine gets."""

from typing import Protocol

from megatron_rl.tasks.base import Tokenizer


class ChatOptions(Protocol):
    """The part of a task's section that says how a question is put."""

    @property
    def chat_template(self) -> bool:
        """Whether the question is a user's turn."""
        ...

    @property
    def system_prompt(self) -> str:
        """The turn before it."""
        ...


def render(
    question: str | list[dict[str, str]], options: ChatOptions, tokenizer: Tokenizer
) -> tuple[str, tuple[int, ...]]:
    """Return the text of a prompt and its token ids: the question as it is, or through the chat template.

    A question may be a conversation already, which only a chat template can put.
    """
    if isinstance(question, str) and not options.chat_template:
        return question, tuple(tokenizer.encode(question, add_special_tokens=True))
    turns = [{"role": "system", "content": options.system_prompt}] if options.system_prompt else []
    turns += [{"role": "user", "content": question}] if isinstance(question, str) else question
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text, tuple(tokenizer.encode(text, add_special_tokens=False))
