"""Expressions, splits and verifier of chained arithmetic."""

import numpy as np
import pytest

from megatron_rl.config.tasks import ChainedArithmeticTask
from megatron_rl.data.prompts import PromptStream
from megatron_rl.data.types import Prompt, Response
from megatron_rl.tasks import make_task
from megatron_rl.tasks.chained_arithmetic import SYMBOLS, answer, is_heldout, make_expression


class Letters:
    """A tokenizer with one token per symbol."""

    def encode(self, text: str, *, add_special_tokens: bool, **options: bool) -> list[int]:
        return [SYMBOLS.index(symbol) for symbol in text]

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt, **variables):
        raise NotImplementedError


TASK = make_task(ChainedArithmeticTask(), Letters())


def response(text: str, finish_reason: str = "stop") -> Response:
    return Response("r", "p", 0, np.array((1,)), np.array((0.0,)), text, finish_reason, ((0, 0, 1),))


@pytest.mark.parametrize(
    ("expression", "value"), [("7+5*3-2", 4), ("0-1", 9), ("9*9*9", 9), ("2-5*3", 1), ("1+2+3+4+5+6", 1)]
)
def test_values_go_from_left_to_right_modulo_ten(expression, value):
    assert answer(expression) == value


def test_no_expression_is_in_both_splits_whatever_the_seed():
    train = {make_expression("train", seed, i) for seed in range(3) for i in range(400)}
    heldout = {make_expression("heldout", seed, i) for seed in range(3) for i in range(400)}
    assert not train & heldout
    assert all(map(is_heldout, heldout))
    assert not any(map(is_heldout, train))


def test_prompts_are_a_pure_function_of_seed_and_position():
    again = make_task(ChainedArithmeticTask(), Letters())
    assert TASK.prompts("train", 5)[17] == again.prompts("train", 5)[17]
    assert TASK.prompts("train", 5)[17] != TASK.prompts("train", 6)[17]
    ids = [p.id for p in PromptStream(TASK.prompts("train", 0)).take(100)]
    assert len(set(ids)) == 100


def test_this_prompt_never_changes():
    assert make_expression("train", 0, 0) == "8*7*9*0"
    assert TASK.prompts("heldout", 0)[3].text == "4+4*1-1+1="


def test_lengths_and_operators_are_about_uniform():
    expressions = [make_expression("train", 0, i) for i in range(3000)]
    for operations in (3, 4, 5):
        share = sum(len(e) == 2 * operations + 1 for e in expressions) / 3000
        assert share == pytest.approx(1 / 3, abs=0.03)
    text = "".join(expressions)
    signs = [text.count(sign) for sign in "+-*"]
    assert max(signs) < 1.1 * min(signs)
    digits = [text.count(digit) for digit in "0123456789"]
    assert max(digits) < 1.15 * min(digits)


@pytest.mark.parametrize(
    ("text", "finish_reason", "score"),
    [
        ("7+5=2;2*3=6;6-2=4;#4", "stop", 1.0),
        ("#4", "stop", 1.0),
        ("#5#4", "stop", 1.0),
        ("#4", "length", 0.0),
        ("#4", "abort", 0.0),
        ("#44", "stop", 0.0),
        ("#4;", "stop", 0.0),
        ("#", "stop", 0.0),
        ("4", "stop", 0.0),
        ("", "stop", 0.0),
    ],
)
def test_only_the_right_number_after_the_last_mark_of_an_ended_answer_counts(text, finish_reason, score):
    prompt = Prompt("p", (1,), "7+5*3-2=", "4")
    verdict = TASK.verify(prompt, response(text, finish_reason))
    assert verdict.score == score
    assert verdict.correct == (score == 1.0)
    assert bool(verdict.reason) == (score == 0.0)
