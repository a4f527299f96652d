"""Tasks of reasoning-gym: prompts by seed and position, splits by text, scores of the package."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.config.tasks import MixtureTask, ReasoningGymTask
from megatron_rl.data.prompts import first_prompts
from megatron_rl.data.types import Response
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.tasks import make_task
from megatron_rl.tasks.reasoning_gym import HASH_SEED_DEPENDENT, ReasoningGym, check_gym
from tests.tasks.test_jsonl import Bytes

SUMS = {"chain_sum": MixtureTask(options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})}


def gym(mixture=None, **options) -> ReasoningGym:
    return ReasoningGym(ReasoningGymTask(mixture=mixture or SUMS, **options), Bytes())


def answered(text: str, finish_reason: str = "stop") -> Response:
    return Response("r", "p", 0, np.array((1,)), np.array((0.0,)), text, finish_reason, ((0, 0, 1),))


def test_prompts_are_a_pure_function_of_seed_and_position():
    one, other = gym(), gym()
    assert [one.prompts("train", 3)[i] for i in (0, 70, 1)] == [other.prompts("train", 3)[i] for i in (0, 70, 1)]
    assert one.prompts("train", 3)[0] != one.prompts("train", 4)[0]
    assert len({prompt.id for prompt in first_prompts(one.prompts("train", 3), 100)}) == 100


def test_this_prompt_never_changes():
    assert gym().prompts("train", 0)[0].text == "State the final answer to the following arithmetic problem: 1 - 4 ="


def test_no_question_is_in_both_splits_even_of_a_task_with_few():
    task = gym()
    train, heldout = (
        {task.prompts(split, seed)[i].text for seed in range(2) for i in range(150)} for split in ("train", "heldout")
    )
    assert train
    assert heldout
    assert not train & heldout


def test_a_mixture_follows_its_weights_and_says_task_and_difficulty():
    mixture = {
        "chain_sum": MixtureTask(weight=3),
        "hard": MixtureTask(dataset="chain_sum", options={"min_terms": 5, "max_terms": 6}),
        "spell_backward": MixtureTask(weight=2, level=1),
    }
    prompts = first_prompts(gym(mixture).prompts("train", 0), 600)
    found = Counter((prompt.metadata["task"], prompt.metadata["difficulty"]) for prompt in prompts)
    assert set(found) == {("chain_sum", "default"), ("chain_sum", "hard"), ("spell_backward", "level 1")}
    assert found["chain_sum", "default"] / 600 == pytest.approx(3 / 6, abs=0.07)  # 3.4 standard deviations
    assert found["chain_sum", "hard"] / 600 == pytest.approx(1 / 6, abs=0.055)


def test_levels_make_harder_questions():
    easy, hard = (gym({"spell_backward": MixtureTask(level=level)}).prompts("train", 0) for level in (0, 3))
    assert max(len(p.answer) for p in first_prompts(easy, 50)) < max(len(p.answer) for p in first_prompts(hard, 50))


@pytest.mark.parametrize(
    ("extract", "right", "wrong"),
    [
        ("tag", "so <answer> {} </answer>", "so {}"),
        ("boxed", r"so $\boxed{{{}}}$", "so {}"),
        ("number", "1 and then {}", "{} and then 777"),
        ("last_line", "so\n{}\n\n", "{}\nor so"),
        ("whole", " {}\n", "so {}"),
    ],
)
def test_extraction_rules(extract, right, wrong):
    task = gym(extract=extract)
    prompt = task.prompts("train", 0)[5]
    assert task.verify(prompt, answered(right.format(prompt.answer))).score == 1.0
    assert task.verify(prompt, answered(right.format(prompt.answer))).correct
    assert not task.verify(prompt, answered(wrong.format(prompt.answer))).correct
    assert task.verify(prompt, answered(right.format(prompt.answer), "length")).score == 0.0
    assert task.verify(prompt, answered("")).reason == f"no answer found by task.extract = {extract}"


def test_a_verifier_without_the_prompts_gives_the_same_score():
    prompt = replace(gym().prompts("heldout", 0)[9], text="", answer="")
    answer = gym().datasets.entry(prompt.metadata["source"])[1]["answer"]
    assert gym(extract="whole").verify(prompt, answered(answer)).score == 1.0


def test_partial_credit_of_the_package_is_the_reward_but_not_correct():
    task = gym({"letter_counting": MixtureTask(), "spell_backward": MixtureTask()}, extract="whole")
    prompt = next(p for p in first_prompts(task.prompts("train", 0), 20) if p.metadata["task"] == "spell_backward")
    verdict = task.verify(prompt, answered(prompt.answer[:-1] + "?"))
    assert verdict.score not in (None, 0.0, 1.0)
    assert not verdict.correct


def test_questions_that_are_too_long_are_replaced_and_counted(caplog):
    plain = [len(p.input_ids) for p in first_prompts(gym({"spell_backward": MixtureTask()}).prompts("train", 0), 40)]
    limit = sorted(plain)[20]
    task = gym({"spell_backward": MixtureTask()}, max_prompt_tokens=limit)
    assert max(len(p.input_ids) for p in first_prompts(task.prompts("train", 0), 40)) <= limit
    assert task.too_long > 5
    assert f"more than {limit} tokens" in caplog.text
    with pytest.raises(DataError, match="none of 1000 questions can be used"):
        gym(max_prompt_tokens=3).prompts("train", 0)[0]


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ({"chain_summ": MixtureTask()}, "did you mean chain_sum?"),
        ({"composite": MixtureTask()}, "no such task"),
        ({"x": MixtureTask(dataset="chain_sum", options={"min_term": 1})}, "unknown option 'min_term'"),
        ({"x": MixtureTask(dataset="chain_sum", options={"seed": 1})}, "unknown option 'seed'"),
        ({"chain_sum": MixtureTask(options={"min_terms": 9, "max_terms": 2})}, "rejects"),
        ({"chain_sum": MixtureTask(level=99)}, "levels 0 to"),
    ],
)
def test_an_invalid_mixture_is_one_error_before_any_work(mixture, words):
    options = ReasoningGymTask(mixture=mixture)
    assert len(list(check_gym(options))) == 1
    with pytest.raises(ConfigError, match=r"task\.mixture") as caught:
        make_task(options, Bytes())
    assert words in str(caught.value)


def test_a_missing_package_is_a_clear_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'megatron-rl[tasks]'" in next(check_gym(ReasoningGymTask(mixture=SUMS)))


def test_tasks_that_depend_on_the_hash_seed_need_one(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ConfigError, match=r"ransom_note .*set PYTHONHASHSEED=0"):
        gym({"ransom_note": MixtureTask(), **SUMS})
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert gym({"ransom_note": MixtureTask()}).prompts("train", 0)[0].answer in ("True", "False")


HASH_QUESTIONS = """
import hashlib, sys
from megatron_rl.config.tasks import ReasoningGymTask, Share
from megatron_rl.tasks.reasoning_gym import MixtureDatasets
for name in sys.argv[1:]:
    entry = MixtureDatasets(ReasoningGymTask(mixture={name: Share()})).entry(f"{name}:123:0")[1]
    print(name, hashlib.sha256(repr((entry["question"], entry["answer"])).encode()).hexdigest())
"""


@pytest.mark.slow
def test_every_other_task_is_the_same_in_every_process():
    from reasoning_gym.factory import DATASETS

    names = sorted(set(DATASETS) - {"composite"})
    assert len(names) > 100

    def hashes(words: list[str], seed: str) -> list[str]:
        command = [sys.executable, "-c", HASH_QUESTIONS, *words]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()

    stable = [name for name in names if name not in HASH_SEED_DEPENDENT]
    assert hashes(stable, "1") == hashes(stable, "2")
    assert hashes(sorted(HASH_SEED_DEPENDENT), "0") == hashes(sorted(HASH_SEED_DEPENDENT), "0")


def test_the_mixture_is_read_from_a_file_and_wrong_keys_are_named(tmp_path):
    file = tmp_path / "gym.toml"
    head = '[model]\npath = "x"\n[task]\nname = "reasoning_gym"\n'
    file.write_text(f"{head}[task.mixture.chain_sum]\nweight = 2\n[task.mixture.gcd.options]\nmax_value = 20\n")
    task = load(Run, [file]).run.task
    assert isinstance(task, ReasoningGymTask)
    assert task.mixture["chain_sum"].weight == 2
    assert task.mixture["gcd"].options == {"max_value": 20}
    file.write_text(f"{head}[task.mixture.chain_sum]\nwieght = 2\n")
    with pytest.raises(ConfigError, match=r"task\.mixture\.chain_sum\.wieght"):
        load(Run, [file])


def test_the_mixture_that_is_shipped_makes_questions_of_every_task():
    configs = Path(__file__).resolve().parents[2] / "configs"
    options = load(Run, [configs / "demo.toml", configs / "task" / "arithmetic.toml"]).run.task
    assert isinstance(options, ReasoningGymTask)
    prompts = first_prompts(ReasoningGym(options, Bytes()).prompts("train", 0), 40)
    found = {(prompt.metadata["task"], prompt.metadata["difficulty"]) for prompt in prompts}
    assert found == {(name, "default") for name in ("chain_sum", "products", "gcd")} | {("chain_sum", "three_terms")}
    assert all(prompt.text.startswith("<system>Answer with a number.<user>") for prompt in prompts)
