"""Sums to do from left to right, modulo 10: ``7+5*3-2=`` is answered ``7+5=2;2*3=6;6-2=4;#4`` or directly ``#4``.

A step ends in ``;`` as a sentence ends in a full stop, so that sentence ratios have something to hold on to.
"""

import zlib

from megatron_rl.config.tasks import ChainedArithmeticTask
from megatron_rl.data.prompts import Generated
from megatron_rl.data.types import Prompt, Response, fold_seed
from megatron_rl.tasks.base import Split, Tokenizer, Verdict

OPERATORS = "+-*"
SYMBOLS = "0123456789+-*=;#"
"""Every symbol of prompts and answers; a tokenizer for this task needs these and an end-of-sequence token."""

_HELDOUT_SHARE = 16
"""One expression in this many is held out, chosen by a hash of its text: no seed can mix the splits."""


def is_heldout(expression: str) -> bool:
    """Return whether an expression such as ``7+5*3-2`` belongs to the held-out split."""
    return zlib.crc32(expression.encode()) % _HELDOUT_SHARE == 0


def apply(left: int, operator: str, right: int) -> int:
    """Return one step, modulo 10."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % 10


def answer(expression: str) -> int:
    """Return the value of an expression, left to right, modulo 10."""
    value = int(expression[0])
    for operator, right in zip(expression[1::2], expression[2::2], strict=True):
        value = apply(value, operator, int(right))
    return value


def make_expression(split: Split, seed: int, index: int, operations: tuple[int, int] = (3, 5)) -> str:
    """Return expression ``index`` of a split: uniform over the number of operations, then over symbols."""
    least, most = operations
    attempt = 0
    while True:
        bits = fold_seed((seed, index, attempt))
        bits, more = divmod(bits, most - least + 1)
        bits, digit = divmod(bits, 10)
        expression = str(digit)
        for _ in range(least + more):
            bits, choice = divmod(bits, 10 * len(OPERATORS))
            expression += OPERATORS[choice // 10] + str(choice % 10)
        if is_heldout(expression) == (split == "heldout"):
            return expression
        attempt += 1


class ChainedArithmetic:
    """The task: reward 1 if the number after the last ``#`` is right and the response ended by itself, else 0."""

    def __init__(self, options: ChainedArithmeticTask, tokenizer: Tokenizer) -> None:
        self.operations = (options.min_operations, options.max_operations)
        self.tokenizer = tokenizer

    def prompts(self, split: Split, seed: int) -> Generated:
        """Return the endless prompts of a split."""

        def make(position: int) -> Prompt:
            expression = make_expression(split, seed, position, self.operations)
            text = f"{expression}="
            ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
            labels = {"difficulty": str(len(expression) // 2)}  # operations
            return Prompt(f"{split}-{seed}-{position}", ids, text, str(answer(expression)), labels)

        return Generated(make)

    def verify(self, prompt: Prompt, response: Response) -> Verdict:
        """See the function."""
        return verify(prompt, response)


def verify(prompt: Prompt, response: Response) -> Verdict:
    """Return 1 if what follows the last ``#`` is the answer, and the response ended by itself; else 0."""
    if response.finish_reason != "stop":
        return Verdict(0.0, False, f"did not end: {response.finish_reason}")
    _, mark, found = response.answer_text.rpartition("#")
    if not mark:
        return Verdict(0.0, False, "no #")
    correct = found == prompt.answer
    reason = "" if correct else f"{found!r} instead of {prompt.answer}"
    return Verdict(float(correct), correct, reason, answer=found)
