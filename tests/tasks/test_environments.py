"""The calculator, and environments from files."""

import pytest

from megatron_rl.data.types import Prompt
from megatron_rl.errors import ConfigError
from megatron_rl.tasks.environments import Calculator, calculate, find_environment

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
