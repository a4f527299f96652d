"""Environments of multi-turn responses, by name or from a file. The built-in one is a calculator."""

import ast
import operator
import re
from collections.abc import Callable, Mapping

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
