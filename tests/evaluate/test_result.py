"""Evaluations without servers: files, resuming after an interrupt, metrics, comparisons."""

import json
import os
from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from megatron_rl.cli import main
from megatron_rl.data.prompts import Shuffled
from megatron_rl.data.types import Group, Prompt, Response, fold_seed
from megatron_rl.evaluate import main as evaluation
from megatron_rl.evaluate.metrics import count_by_prompt, subsets
from megatron_rl.evaluate.result_folder import ResultFolder, read_samples
from megatron_rl.tasks.base import Verdict
from megatron_rl.tasks.pool import InlineVerifier

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "configs" / "demo.toml")


class Exam:
    """Twelve prompts of two tasks in two difficulties; a response is a digit, right if it equals the answer."""

    def __init__(self, size=12):
        self.size = size

    def prompts(self, split, seed):
        assert split == "heldout"
        prompts_ = [self.prompt(number) for number in range(self.size)]
        return Shuffled(prompts_, seed)

    @staticmethod
    def prompt(number):
        labels = {"task": "sums" if number % 2 else "odd one", "difficulty": "10" if number % 4 < 2 else "9"}
        return Prompt(f"p{number}", (number,), f"question {number}", str(number % 3), labels)

    @staticmethod
    def verify(prompt, response):
        if response.text == "9":
            return Verdict(None, False, "not verified")
        return Verdict(float(response.text == prompt.answer), response.text == prompt.answer, answer=response.text)


class Answers:
    """A fleet that answers immediately with 0, 1, 2 or 9, determined by the seeds; four prompts per request."""

    skill = 0
    requested: Counter[str]

    def __init__(self):
        self.requested = Counter()

    def submit(self, prompts, group_size, sampling, seed, versions, *, indices, routes):
        chunks = []
        for first in range(0, len(prompts), 4):
            if not indices.isdisjoint(range(first, first + 4)):
                part = prompts[first : first + 4]
                future = Future()
                future.set_result([self.group(prompt, group_size, seed) for prompt in part])
                self.requested.update(prompt.id for prompt in part)
                chunks.append((first, future))
        return chunks

    def group(self, prompt, group_size, seed):
        return Group(prompt, tuple(self.response(prompt, index, seed) for index in range(group_size)))

    def response(self, prompt, index, seed):
        drawn = fold_seed((*seed, int(prompt.id[1:]), index)) % 10
        text = prompt.answer if drawn < self.skill else "0129"[drawn % 4]
        end = "length" if drawn == 7 else "stop"
        return Response(
            f"{prompt.id}/{index}", prompt.id, index, np.array((1, 2)), np.array((0.0, 0.0)), text, end, ((0, 0, 2),)
        )


@pytest.fixture
def fleet(monkeypatch):
    answers = Answers()

    @contextmanager
    def serving(run, tokenizer, scratch):
        yield answers

    monkeypatch.setattr(evaluation, "serving", serving)
    monkeypatch.setattr(evaluation, "make_task", lambda options, tokenizer: Exam())
    monkeypatch.setattr(evaluation, "open_verifier", lambda run: InlineVerifier(lambda *pair: Exam.verify(*pair)))
    return answers


def evaluate(output, *settings):
    return main(["eval", DEMO, "evaluate.samples=4", f"--output={output}", *settings])


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_metrics_are_reported_for_all_prompts_tasks_and_difficulties(fleet, tmp_path, capsys):
    assert evaluate(tmp_path / "a") == 0
    parsed = result(tmp_path / "a")
    rows = [(row["task"], row["difficulty"], row["prompts"]) for row in parsed["figures"]]
    assert rows == [
        (None, None, 12),
        ("odd one", None, 6),
        ("odd one", "9", 3),
        ("odd one", "10", 3),
        ("sums", None, 6),
        ("sums", "9", 3),
        ("sums", "10", 3),
    ]
    lines = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
    everything = parsed["figures"][0]
    assert everything["samples"] == len(lines) == 48
    assert everything["unverified"] == sum(line["reward"] is None for line in lines) > 0
    assert everything["truncated"] == sum(line["finish_reason"] == "length" for line in lines) > 0
    assert everything["pass@1"]["mean"] == pytest.approx(sum(line["correct"] for line in lines) / 48)
    solved = {line["prompt_id"] for line in lines if line["correct"]}
    assert everything["pass@4"]["mean"] == pytest.approx(len(solved) / 12)
    assert {"pass@2", "majority@2", "majority@4"} <= set(everything)
    output_ = capsys.readouterr().out
    assert "majority@4" in output_
    assert "without a verdict counts as wrong" in output_


def test_the_same_command_gives_the_same_result(fleet, tmp_path):
    assert evaluate(tmp_path / "a") == evaluate(tmp_path / "b") == 0
    for name in ("samples.jsonl", "result.json", "evaluation.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    evaluate(tmp_path / "c", "train.seed=1")
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() != (tmp_path / "c" / "samples.jsonl").read_bytes()


def test_an_interrupted_evaluation_keeps_its_samples(fleet, tmp_path, monkeypatch, capsys):
    evaluate(tmp_path / "whole")
    add = ResultFolder.add
    calls: list[Group] = []

    def interrupted(folder, group, verdicts, task):
        calls.append(group)
        if len(calls) == 6:
            raise KeyboardInterrupt
        add(folder, group, verdicts, task)

    monkeypatch.setattr(ResultFolder, "add", interrupted)
    assert evaluate(tmp_path / "cut") == 130
    assert "5 of 12 prompts are in" in capsys.readouterr().out
    written = (tmp_path / "cut" / "samples.jsonl").read_bytes()
    assert len(written.splitlines()) == 20
    with (tmp_path / "cut" / "samples.jsonl").open("ab") as file:  # an incomplete line, as after kill -9
        file.write(written.splitlines(keepends=True)[0].replace(b'"p', b'"p1')[:40])
    monkeypatch.setattr(ResultFolder, "add", add)
    fleet.requested.clear()
    assert evaluate(tmp_path / "cut") == 0
    assert len(fleet.requested) == 8  # the first request is not sent again
    assert (tmp_path / "cut" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    assert (tmp_path / "cut" / "result.json").read_bytes() == (tmp_path / "whole" / "result.json").read_bytes()


def test_a_finished_result_is_printed_again_without_requests(fleet, tmp_path):
    evaluate(tmp_path / "a")
    fleet.requested.clear()
    assert evaluate(tmp_path / "a") == 0
    assert not fleet.requested


def test_a_folder_holds_one_evaluation(fleet, tmp_path, capsys):
    evaluate(tmp_path / "a")
    assert evaluate(tmp_path / "a", "evaluate.temperature=0.5") == 2
    output_ = capsys.readouterr().err
    assert "sampling.temperature: 1.0 -> 0.5" in output_
    assert "--output" in output_


def test_greedy_decoding_needs_one_sample(fleet, tmp_path, capsys):
    assert evaluate(tmp_path / "a", "evaluate.temperature=0") == 2
    assert "write samples = 1" in capsys.readouterr().err


def test_without_known_votes_there_is_no_majority(fleet, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Exam, "verify", staticmethod(lambda prompt, response: Verdict(1.0, True)))
    assert evaluate(tmp_path / "a") == 0
    assert not any(key.startswith("majority") for row in result(tmp_path / "a")["figures"] for key in row)
    assert "no majority votes" in capsys.readouterr().out


def compare_results(capsys, *folders, output=None):
    extra = [f"--output={output}"] if output else []
    status = main(["eval", "--compare", *map(str, folders), *extra])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_two_results_are_compared_prompt_by_prompt(fleet, tmp_path, capsys):
    evaluate(tmp_path / "weak")
    fleet.skill = 6
    evaluate(tmp_path / "strong", "evaluate.temperature=0.9")
    status, output_ = compare_results(capsys, tmp_path / "weak", tmp_path / "strong", output=tmp_path / "both.json")
    assert status == 0
    assert "sampling.temperature: 1.0 -> 0.9" in output_
    rows = json.loads((tmp_path / "both.json").read_text())["comparisons"]
    first = rows[0]
    assert first["prompts"] == 12
    assert first["b"] == pytest.approx(result(tmp_path / "strong")["figures"][0]["pass@1"]["mean"])
    assert first["difference"]["mean"] == pytest.approx(first["b"] - first["a"])
    assert first["difference"]["low"] > 0.2
    assert first["p"] < 0.01
    assert all(row["p_holm"] >= row["p"] for row in rows[1:])
    status, _ = compare_results(capsys, tmp_path / "weak", tmp_path / "weak", output=tmp_path / "same.json")
    assert status == 0
    assert json.loads((tmp_path / "same.json").read_text())["comparisons"][0]["p"] == 1.0


def test_other_prompts_are_not_compared(fleet, tmp_path, capsys, monkeypatch):
    evaluate(tmp_path / "a")
    monkeypatch.setattr(evaluation, "make_task", lambda options, tokenizer: Exam(10))
    evaluate(tmp_path / "b")
    status, output_ = compare_results(capsys, tmp_path / "a", tmp_path / "b")
    assert status == 2
    assert "the prompts differ" in output_
    assert "has 12" in output_
    assert "10 have the same id" in output_


def test_unfinished_results_are_not_compared(fleet, tmp_path, capsys):
    evaluate(tmp_path / "a")
    evaluate(tmp_path / "b")
    lines = (tmp_path / "b" / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b" / "samples.jsonl").write_bytes(b"".join(lines[:-1]))
    status, output_ = compare_results(capsys, tmp_path / "a", tmp_path / "b")
    assert status == 2
    assert "11 of 12 prompts are answered" in output_
    status, output_ = compare_results(capsys, tmp_path / "a", tmp_path)
    assert status == 2
    assert "has no result" in output_


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to evaluate"),
        (["--compare", "a", "b", "c.toml"], "leave c.toml out"),
        ([DEMO, "model.path=nowhere"], "nowhere"),
        ([str(ROOT / "tests"), DEMO], "config.json"),
        ([str(ROOT / "configs" / "demo-model"), "model.path=x"], "leave one out"),
    ],
)
def test_invalid_commands_are_one_error_message(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *words]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == []


def test_difficulties_are_in_the_order_of_their_numbers(fleet, tmp_path):
    evaluate(tmp_path / "a")
    counted = count_by_prompt(read_samples(tmp_path / "a"))
    assert [level for task, level, _ in subsets(counted) if task == "sums" and level] == ["9", "10"]
