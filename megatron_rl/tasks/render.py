"""Conversion of a question to the text and token ids of a prompt.

Control tokens (the tokenizer's special tokens, such as ``<|im_end|>``) that a data file contains as text are escaped:
they are encoded as ordinary characters, so data cannot end a turn or begin another one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_rl.config.tasks import Option
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.tasks.base import Tokenizer

Turns = list[dict[str, str]]
"""A conversation: a list of turns with ``role`` and ``content``."""

FIRST_PLACEHOLDERS = (0xF0000, 0x100000)
"""Characters for private use, from one of these on, stand for control tokens while the chat template runs."""


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

    @property
    def template(self) -> Mapping[str, Option]:
        """Further variables of the chat template."""
        ...

    @property
    def tools(self) -> str | None:
        """File with the JSON schemas of the tools that the chat template shows; None for none."""
        ...

    @property
    def prefill(self) -> str:
        """Beginning of each response, which is part of the prompt."""
        ...

    @property
    def continue_last_turn(self) -> bool:
        """Whether the response continues a conversation's last turn if that is the assistant's."""
        ...

    @property
    def escape_control_tokens(self) -> bool | None:
        """Whether control tokens in the data are encoded as characters; None: with ``chat_template``."""
        ...


@dataclass(frozen=True)
class EscapedText:
    """A text in which placeholders stand for control tokens.

    Attributes:
        text: the text with placeholders.
        tokens: the control token that each placeholder stands for.
    """

    text: str
    tokens: Mapping[str, str]

    @property
    def original(self) -> str:
        """The text without placeholders."""
        text = self.text
        for placeholder, token in self.tokens.items():
            text = text.replace(placeholder, token)
        return text


class PromptRenderer:
    """Renders and encodes prompts with a tokenizer, its chat template and the options of a task.

    Raises:
        ConfigError: the options and the tokenizer do not fit each other, or the file of tools cannot be used.
    """

    def __init__(self, options: ChatOptions, tokenizer: Tokenizer) -> None:
        self.options, self.tokenizer = options, tokenizer
        self.control_tokens = control_tokens(tokenizer)
        self._variables: dict[str, object] = {**options.template}
        source = getattr(tokenizer, "chat_template", "")
        if options.chat_template and source is None:
            raise ConfigError(
                "task.chat_template = true, but the tokenizer of the model has no chat template; copy"
                " chat_template.jinja of the model, or write task.chat_template = false"
            )
        for name in options.template:
            if source and name not in str(source):
                raise ConfigError(
                    f"task.template.{name}: the tokenizer's chat template has no variable {name!r}; correct the name or"
                    " leave it out"
                )
        if options.tools is not None:
            self._variables["tools"] = read_tools(Path(options.tools))

    @property
    def escapes(self) -> bool:
        """Whether control tokens in the data are encoded as characters."""
        setting = self.options.escape_control_tokens
        return self.options.chat_template if setting is None else setting

    def render(self, question: str | Turns) -> tuple[str, tuple[int, ...]]:
        """Return the text of a prompt and its token ids: the question unchanged, or formatted by the chat template.

        A question that is a conversation always goes through the chat template.

        Raises:
            DataError: the prompt cannot be rendered, or has no token.
        """
        if isinstance(question, str) and not self.options.chat_template:
            escaped = self._escape([question])
            text = EscapedText(_with_placeholders(question, escaped) + self.options.prefill, escaped)
            ids = self.encode(text, add_special_tokens=True)
        else:
            turns, prefill = self.turns(question)
            text = self.template(turns, generation_prompt=True)
            text = EscapedText(text.text + prefill + self.options.prefill, text.tokens)
            ids = self.encode(text)
        if not ids:
            raise DataError("the prompt has no token: the tokenizer makes none of its text; write another prompt")
        return text.original, ids

    def turns(self, question: str | Turns) -> tuple[Turns, str]:
        """Return the turns before the response, and the beginning of the response.

        Raises:
            DataError: the question is a conversation that cannot be used.
        """
        turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
        if self.options.system_prompt:
            if any(turn["role"] == "system" for turn in turns):
                raise DataError(
                    "the conversation has a system turn, and task.system_prompt is set: the model would see both; leave"
                    " one of them out"
                )
            turns = [{"role": "system", "content": self.options.system_prompt}, *turns]
        if turns[-1]["role"] != "assistant":
            return turns, ""
        if not self.options.continue_last_turn:
            raise DataError(
                "the last turn of the conversation is the assistant's, so the prompt would contain an answer; end it"
                " with another turn, or write task.continue_last_turn = true to let responses continue this turn"
            )
        return turns[:-1], turns[-1]["content"]

    def template(self, turns: Turns, *, generation_prompt: bool, trusted_role: str | None = None) -> EscapedText:
        """Return the chat template's rendering of a conversation, with placeholders for control tokens of the data.

        Args:
            turns: the conversation.
            generation_prompt: whether it ends where the assistant's turn begins.
            trusted_role: role of turns that are no data, whose control tokens are not escaped.

        Raises:
            DataError: the template fails; the message has its words.
        """
        tokens = self._escape([turn["content"] for turn in turns if turn["role"] != trusted_role])
        turns = [
            turn if turn["role"] == trusted_role else {**turn, "content": _with_placeholders(turn["content"], tokens)}
            for turn in turns
        ]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation_prompt, **self._variables
            )
        except Exception as error:  # templates are programs: they raise what their author chose
            raise DataError(
                f"the chat template of the tokenizer (task.chat_template) fails: {type(error).__name__}: {error}"
            ) from error
        return EscapedText(text, tokens)

    def encode(self, text: EscapedText, *, add_special_tokens: bool = False) -> tuple[int, ...]:
        """Return the token ids of a text; placeholders become the characters of their control tokens.

        Raises:
            DataError: the tokenizer cannot encode a control token as characters.
        """
        encode = self.tokenizer.encode
        if not text.tokens:
            return tuple(encode(text.text, add_special_tokens=add_special_tokens))
        ids: list[int] = []
        part = ""
        for symbol in text.text:
            if symbol in text.tokens:
                ids += encode(part, add_special_tokens=add_special_tokens and not ids) if part or not ids else []
                ids += self._as_characters(text.tokens[symbol])
                part = ""
            else:
                part += symbol
        return (*ids, *(encode(part, add_special_tokens=False) if part else ()))

    def _as_characters(self, token: str) -> Sequence[int]:
        ids = self.tokenizer.encode(token, add_special_tokens=False, split_special_tokens=True)
        if self.tokenizer.encode(token, add_special_tokens=False) == ids:
            raise DataError(
                f"the text contains the control token {token!r}, which the tokenizer cannot encode as characters;"
                " remove it, or write escape_control_tokens = false to keep it as a token"
            )
        return ids

    def _escape(self, contents: Sequence[str]) -> Mapping[str, str]:
        """Return placeholders for the control tokens in the contents of turns, none if they are not escaped."""
        if not self.escapes:
            return {}
        if not any(token in content for token in self.control_tokens for content in contents):
            return {}
        count = len(self.control_tokens)
        ranges = ([chr(first + i) for i in range(count)] for first in FIRST_PLACEHOLDERS)
        placeholders = next(
            (r for r in ranges if not any(symbol in content for symbol in r for content in contents)), ()
        )
        return dict(zip(placeholders, self.control_tokens, strict=False))


def control_tokens(tokenizer: object) -> tuple[str, ...]:
    """Return the texts of the tokenizer's special tokens, longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return tuple(sorted({str(token) for token in added if token.special}, key=len, reverse=True))


def _with_placeholders(content: str, tokens: Mapping[str, str]) -> str:
    for placeholder, token in tokens.items():
        content = content.replace(token, placeholder)
    return content


def read_tools(path: Path) -> list[object]:
    """Return the JSON schemas of tools from a file.

    Raises:
        ConfigError: the file is no JSON list of objects.
    """
    try:
        tools = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path} (task.tools): {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} (task.tools) is not JSON: {error}") from error
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"{path} (task.tools) must hold a JSON list of schemas, one object per tool")
    return tools
