"""Arithmetic from left to right, modulo 10: the answer to ``7+5*3-2=`` is ``7+5=2;2*3=6;6-2=4;#4``, or just ``#4``.

Each step ends in ``;``, which sentence-level objectives treat as the end of a sentence.
"""

import zlib

from megatron_rl.config.tasks import ChainedArithmeticTask
from megatron_rl.data.prompts import Generated
from megatron_rl.data.types import Prompt, Response, fold_seed
from megatron_rl.tasks.base import Split, Tokenizer, Verdict, unfinished

OPERATORS = "+-*"
SYMBOLS = "0123456789+-*=;#"
"""The characters of prompts and answers. A tokenizer for this task needs these and an end-of-sequence token."""

_HELDOUT_DIVISOR = 16
"""One expression in 16 is held out, chosen by a hash of its text, so no seed can mix the splits."""


def is_heldout(expression: str) -> bool:
    """Return whether an expression such as ``7+5*3-2`` belongs to the held-out split."""
    return zlib.crc32(expression.encode()) % _HELDOUT_DIVISOR == 0


def apply(left: int, operator: str, right: int) -> int:
    """Return the result of one operation, modulo 10."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % 10


def answer(expression: str) -> int:
    """Return the value of an expression, left to right, modulo 10."""
    value = int(expression[0])
    for operator, right in zip(expression[1::2], expression[2::2], strict=True):
        value = apply(value, operator, int(right))
    return value


def make_expression(split: Split, seed: int, index: int, operations: tuple[int, int] = (3, 5)) -> str:
    """Return expression ``index`` of a split, uniform over the number of operations, then over digits and operators."""
    least, most = operations
    attempt = 0
    while True:
        bits = fold_seed((seed, index, attempt))
        bits, extra = divmod(bits, most - least + 1)
        bits, digit = divmod(bits, 10)
        expression = str(digit)
        for _ in range(least + extra):
            bits, choice = divmod(bits, 10 * len(OPERATORS))
            expression += OPERATORS[choice // 10] + str(choice % 10)
        if is_heldout(expression) == (split == "heldout"):
            return expression
        attempt += 1


class ChainedArithmetic:
    """The chained arithmetic task; ``verify`` below gives the reward."""

    def __init__(self, options: ChainedArithmeticTask, tokenizer: Tokenizer) -> None:
        self.operations = (options.min_operations, options.max_operations)
        self.tokenizer = tokenizer

    def prompts(self, split: Split, seed: int) -> Generated:
        """Return the prompts of a split, an infinite sequence."""

        def make(position: int) -> Prompt:
            expression = make_expression(split, seed, position, self.operations)
            text = f"{expression}="
            ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
            labels = {"difficulty": str(len(expression) // 2)}  # operations
            return Prompt(f"{split}-{seed}-{position}", ids, text, str(answer(expression)), labels)

        return Generated(make)

    def verify(self, prompt: Prompt, response: Response) -> Verdict:
        """Return the verdict of the function ``verify``."""
        return verify(prompt, response)


def verify(prompt: Prompt, response: Response) -> Verdict:
    """Return score 1 if the response ended by itself and the text after its last ``#`` is the answer, else 0."""
    if verdict := unfinished(response):
        return verdict
    _, marker, answered = response.answer_text.rpartition("#")
    if not marker:
        return Verdict(0.0, False, "no #")
    correct = answered == prompt.answer
    reason = "" if correct else f"{answered!r} instead of {prompt.answer}"
    return Verdict(float(correct), correct, reason, answer=answered)
