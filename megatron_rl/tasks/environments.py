"""Environments of multi-turn responses, by name or from a file. The built-in one is a calculator."""

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from megatron_rl.config.from_file import load_object
from megatron_rl.data.environment import Environment
from megatron_rl.data.types import Prompt
from megatron_rl.errors import ConfigError

MAX_EXPRESSION_CHARS = 200
"""Longest expression that the calculator evaluates."""

_CALL = re.compile(r"<calc>(.*?)</calc>\s*$", re.DOTALL)
_BINARY: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Calculator:
    """Answers a turn ending in ``<calc>12 * (3 + 4)</calc>`` with ``<result>84</result>``. Any other turn is last."""

    def reset(self, prompt: Prompt) -> None:
        """Do nothing: the calculator has no state."""

    def step(self, turn: str) -> str | None:
        """Return the result of the expression at the end of the turn; None if the response is complete."""
        call = _CALL.search(turn)
        return None if call is None else f"<result>{calculate(call[1])}</result>"


def calculate(expression: str) -> str:
    """Return the value of an expression of numbers, parentheses and + - * / // %, or ``error``."""
    if len(expression) > MAX_EXPRESSION_CHARS:
        return "error"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        return str(int(value)) if value == int(value) else f"{value:.10g}"
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return "error"


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=symbol, right=right) if type(symbol) in _BINARY:
            return _BINARY[type(symbol)](_value(left), _value(right))
    raise ValueError(f"not an arithmetic expression: {ast.dump(node)}")


ENVIRONMENTS: Mapping[str, Callable[[], Environment]] = {"calculator": Calculator}


def find_environment(name: str) -> Callable[[], Environment]:
    """Return the class or factory of an environment, by name or as ``path/to/file.py:Class``.

    Raises:
        ConfigError: there is no such name, or the class has no ``reset`` or ``step``.
    """
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    environment = load_object(name, "environment.name", ", ".join(ENVIRONMENTS))
    for method in ("reset", "step"):
        if not callable(getattr(environment, method, None)):
            raise ConfigError(f"{name} (environment.name) has no method {method}; write a class with reset and step")
    return environment


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that multi-turn responses use."""

    @property
    def eos_token(self) -> str | None:
        """The token that ends the model's turn."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """Return the text of a conversation."""
        ...


def chat_wrap(tokenizer: ChatTokenizer, role: str) -> Callable[[str], str]:
    """Return a function that formats a text as a turn of ``role`` between two turns of the model.

    It uses the chat template. The formatted text begins after the end-of-sequence token, which the model has sampled.
    """

    def wrap(text: str) -> str:
        turns: Sequence[Mapping[str, str]] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        before = tokenizer.apply_chat_template([dict(t) for t in turns], tokenize=False, add_generation_prompt=False)
        longer = [*(dict(turn) for turn in turns), {"role": role, "content": text}]
        after = tokenizer.apply_chat_template(longer, tokenize=False, add_generation_prompt=True)
        if not after.startswith(before):
            raise ConfigError(
                f"the chat template changes a turn when another one follows, so environment.role = {role!r} cannot be"
                ' used; set environment.role = "" and let the environment write the whole text'
            )
        end = tokenizer.eos_token
        cut = before.rfind(end) + len(end) if end and end in before else len(before)
        return after[cut:]

    return wrap
