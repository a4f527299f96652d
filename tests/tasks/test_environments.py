"""The calculator, environments from files, and turns through a chat template."""

import pytest

from megatron_rl.data.types import Prompt
from megatron_rl.errors import ConfigError
from megatron_rl.tasks.environments import Calculator, calculate, chat_wrap, find_environment

ROOT_PROMPT = Prompt("p", (1,), "", "")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 * (3 + 4)", "84"),
        ("7/2", "3.5"),
        ("-7 // 2", "-4"),
        ("1e3", "1000"),
        ("1/0", "error"),
        ("2**9999999999", "error"),
        ("__import__('os')", "error"),
        ("1 +", "error"),
        ("(" * 150 + ")" * 150, "error"),
        ("9" * 500, "error"),
        ("1e308*1e308", "error"),
        ("True", "error"),
    ],
)
def test_the_calculator_evaluates_arithmetic_only(expression, value):
    assert calculate(expression) == value


def test_a_call_at_the_end_of_a_turn_is_answered_and_any_other_turn_ends():
    environment = Calculator()
    environment.reset(ROOT_PROMPT)
    assert environment.step("I need <calc>3*4</calc>\n") == "<result>12</result>"
    assert environment.step("<calc>3*4</calc> is 12") is None


def test_an_environment_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Mine:\n    def reset(self, prompt): pass\n    def step(self, turn): return None\n")
    assert find_environment(f"{file}:Mine")().step("x") is None
    file.write_text("class Mine:\n    def reset(self, prompt): pass\n")
    with pytest.raises(ConfigError, match="no method step"):
        find_environment(f"{file}:Mine")
    with pytest.raises(ConfigError, match="one of calculator"):
        find_environment("calculater")


class ChatML:
    eos_token = "<|im_end|>"

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt, **variables):
        turns = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in conversation)
        return turns + "<|im_start|>assistant\n" * add_generation_prompt


def test_a_wrapped_turn_begins_after_the_sampled_end_token():
    wrapped = chat_wrap(ChatML(), "tool")("42")
    assert wrapped == "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    sampled = ChatML().apply_chat_template(conversation, tokenize=False, add_generation_prompt=False)[:-1]
    more = [*conversation, {"role": "tool", "content": "42"}]
    assert sampled + wrapped == ChatML().apply_chat_template(more, tokenize=False, add_generation_prompt=True)


def test_a_template_that_rewrites_earlier_turns_is_an_error():
    class Forgetful(ChatML):
        def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt, **variables):
            return super().apply_chat_template(conversation[-1:], tokenize=False, add_generation_prompt=True)

    with pytest.raises(ConfigError, match=r"environment\.role"):
        chat_wrap(Forgetful(), "tool")("42")
