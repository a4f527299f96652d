"""The tokens between two turns of the model: the environment's message in the form of the chat template.

    prompt | turn + end token | between | turn + end token | between | ...

With ``environment.role`` this sequence is, token for token, the chat template's own rendering of the conversation. A
template or a set of stop tokens for which that does not hold is refused at the start, after one invented conversation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_rl.config.tasks import AnyTask, ChainedArithmeticTask, EnvironmentConfig, Option
from megatron_rl.errors import ConfigError
from megatron_rl.tasks.base import Tokenizer
from megatron_rl.tasks.render import ChatOptions, EscapedText, PromptRenderer, Turns

QUESTION, TURN = "Question", "Answer"
OBSERVATIONS = ("42", "two lines\nof text", " between spaces ", "{control}")
"""Messages of the environment in the invented conversation; the last one is a control token as text."""

THOUGHT = "<think>\nThought\n</think>\n\nAnswer"


class TurnTokenizer(Tokenizer, Protocol):
    """The part of a Hugging Face tokenizer that multi-turn responses need."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of token ids."""
        ...


class TurnFormat(Protocol):
    """Encodes the environment's messages."""

    def __call__(self, message: str, last_token: int) -> tuple[int, ...] | None:
        """Return the tokens to insert after a turn that ended with this token; None if the response ends with it."""
        ...


@dataclass(frozen=True)
class TemplateOptions:
    """The options of the chat template for a task that has none."""

    chat_template: bool = True
    system_prompt: str = ""
    template: Mapping[str, Option] = field(default_factory=dict)
    tools: str | None = None
    prefill: str = ""
    continue_last_turn: bool = False
    escape_control_tokens: bool | None = None


class PlainTurns:
    """Inserts the environment's text as it is, after any stop token. Control tokens in it are tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, message: str, last_token: int) -> tuple[int, ...]:
        """Return the tokens of a message."""
        return tuple(self._tokenizer.encode(message, add_special_tokens=False))


class TemplateTurns:
    """Inserts the environment's text as a turn of the chat template.

    Args:
        options: the options of the task.
        role: role of the environment's turns.
        stop_ids: tokens that end a turn of the model.
        tokenizer: tokenizer of the model.

    Raises:
        ConfigError: with this template and these stop tokens the sequence would not be the template's rendering.
    """

    def __init__(self, options: ChatOptions, role: str, stop_ids: Sequence[int], tokenizer: TurnTokenizer) -> None:
        self._renderer = PromptRenderer(options, tokenizer)
        self._tokenizer, self._role = tokenizer, role
        self._prompt = self._renderer.turns(QUESTION)[0]
        self._head = self._conversation([]).text + options.prefill + TURN
        rest = self._rest(OBSERVATIONS[0]).text
        self._end_id, self._end = self._find_end(rest, stop_ids)
        self._compare()

    def __call__(self, message: str, last_token: int) -> tuple[int, ...] | None:
        """Return the tokens of a message; None after a token that does not end a turn of the template."""
        if last_token != self._end_id:
            return None
        rest = self._rest(message)
        return self._renderer.encode(EscapedText(rest.text.removeprefix(self._end), rest.tokens))

    @property
    def rewrites_thoughts(self) -> bool:
        """Whether the template changes a turn with ``<think>...</think>`` when another one follows."""
        whole = self._conversation([(THOUGHT, OBSERVATIONS[0])]).text
        return not whole.startswith(self._head.removesuffix(TURN) + THOUGHT)

    def _conversation(self, later: Sequence[tuple[str, str]]) -> EscapedText:
        """Return the rendering of the prompt and later pairs of a model's turn and an observation."""
        turns: Turns = list(self._prompt)
        for turn, message in later:
            turns += [{"role": "assistant", "content": turn}, {"role": self._role, "content": message}]
        return self._renderer.template(turns, generation_prompt=True, trusted_role="assistant")

    def _rest(self, message: str) -> EscapedText:
        """Return what follows the model's first turn: its end, the message, and the beginning of the next turn."""
        prefill = self._renderer.options.prefill
        whole = self._conversation([(prefill + TURN, message)])
        if not whole.text.startswith(self._head):
            raise ConfigError(
                f"environment.role = {self._role!r}: the chat template changes a turn when another one follows: it"
                f" renders {_around(whole.text, self._head)} instead of {_around(self._head, whole.text)}; set"
                ' environment.role = "" and let the environment write the whole text'
            )
        return EscapedText(whole.text.removeprefix(self._head) + prefill, whole.tokens)

    def _find_end(self, rest: str, stop_ids: Sequence[int]) -> tuple[int, str]:
        texts = {token: self._tokenizer.decode([token]) for token in stop_ids}
        ends = [(token, text) for token, text in texts.items() if text and rest.startswith(text)]
        if not ends:
            token = self._tokenizer.encode(rest, add_special_tokens=False)[0]
            raise ConfigError(
                f"environment.role = {self._role!r}: the chat template writes {rest[:20]!r} after a turn of the model,"
                f" which is none of the tokens that end a response ({', '.join(map(repr, texts.values())) or 'none'});"
                f" add {token} ({self._tokenizer.decode([token])!r}) to rollout.sampling.stop_token_ids"
            )
        return max(ends, key=lambda end: len(end[1]))

    def _compare(self) -> None:
        """Compare the tokens of an invented conversation with the template's rendering of it.

        Raises:
            ConfigError: they differ.
        """
        control = next(iter(self._renderer.control_tokens), "x")
        messages = [message.format(control=control) for message in OBSERVATIONS]
        prefill = self._renderer.options.prefill
        whole = self._conversation([(prefill + TURN, message) for message in messages])
        expected = list(self._renderer.encode(EscapedText(whole.text + prefill, whole.tokens)))
        prompt = self._conversation([])
        trained = list(self._renderer.encode(EscapedText(prompt.text + prefill, prompt.tokens)))
        for message in messages:
            # The model may write the same text as other tokens, so its turn is taken from the template's rendering.
            end = next((i for i in range(len(trained), len(expected)) if expected[i] == self._end_id), len(expected))
            turn = expected[len(trained) : end]
            trained += [*turn, self._end_id, *(self(message, self._end_id) or ())]
            if self._tokenizer.decode(turn).strip() != TURN or trained != expected[: len(trained)]:
                break
        if trained != expected:
            got, rendered = (self._tokenizer.decode(ids) for ids in (trained, expected[: len(trained)]))
            raise ConfigError(
                f"environment.role = {self._role!r}: the sequence that would be trained is not the chat template's"
                f' rendering: {_around(got, rendered)} instead of {_around(rendered, got)}; set environment.role = ""'
                " and let the environment write the whole text"
            )


def _around(text: str, other: str) -> str:
    """Return the part of a text where it begins to differ from another."""
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return repr(text[max(0, same - 20) : same + 20])


def find_turn_format(
    task: AnyTask, environment: EnvironmentConfig, stop_ids: Sequence[int], tokenizer: TurnTokenizer
) -> TurnFormat:
    """Return the format of the environment's messages.

    Raises:
        ConfigError: the chat template cannot be used for several turns.
    """
    if not environment.role:
        return PlainTurns(tokenizer)
    options = TemplateOptions() if isinstance(task, ChainedArithmeticTask) else task
    return TemplateTurns(options, environment.role, stop_ids, tokenizer)
