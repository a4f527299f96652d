"""Prompt files: accepted and rejected rows, splits, verifiers."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_rl.config.tasks import JsonlTask
from megatron_rl.data.prompts import PromptStream
from megatron_rl.data.types import Response
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.tasks.jsonl import Jsonl


class Bytes:
    """A tokenizer of bytes with a chat template."""

    def encode(self, text: str, *, add_special_tokens: bool, **options: bool) -> list[int]:
        return [1] * add_special_tokens + list(text.encode())

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt, **variables):
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation) + "<assistant>"


def task(path: Path, **options) -> Jsonl:
    return Jsonl(JsonlTask(path=str(path), **options), Bytes())


def rows(path: Path, count: int = 40) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"What is {n}?", "answer": n}) + "\n" for n in range(count)))
    return path


def answered(text: str, finish_reason: str = "stop") -> Response:
    return Response("r", "p", 0, np.array((1,)), np.array((0.0,)), text, finish_reason, ((0, 0, 1),))


def test_prompts_are_tokenized_and_named_by_file_and_line(tmp_path):
    prompts = task(rows(tmp_path / "a.jsonl"), heldout_fraction=0.0).prompts("train", 0)
    one = next(p for p in PromptStream(prompts).take(40) if p.answer == "7")
    assert one.id == "a.jsonl:8"
    assert one.input_ids == (1, *b"What is 7?")


def test_splits_are_disjoint_and_do_not_depend_on_the_order_of_lines(tmp_path):
    file = rows(tmp_path / "a.jsonl", 400)
    one = task(file, heldout_fraction=0.25)
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    other = task(file, heldout_fraction=0.25)
    heldout = {p.text for p in one.splits["heldout"]}
    assert heldout == {p.text for p in other.splits["heldout"]}
    assert not heldout & {p.text for p in one.splits["train"]}
    assert len(heldout) == pytest.approx(100, abs=30)


def test_a_heldout_file_is_used_whole(tmp_path):
    both = task(rows(tmp_path / "a.jsonl"), heldout_path=str(rows(tmp_path / "b.jsonl", 5)))
    assert len(both.splits["train"]) == 40
    assert len(both.splits["heldout"]) == 5


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["not JSON"]),
        ("[1]", ["not a JSON object: [1]"]),
        ('{"question": "x", "answer": "y"}', ["no field 'prompt'", "question, answer", "task.prompt_field"]),
        ('{"prompt": "x"}', ["no field 'answer'", "task.answer_field"]),
        ('{"prompt": "", "answer": "y"}', ['prompt is ""']),
        ('{"prompt": 3, "answer": "y"}', ["prompt is 3", "write a nonempty string"]),
        ('{"prompt": "x", "answer": null}', ["answer is null"]),
        ('{"prompt": "x", "answer": true}', ["answer is true"]),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path, line, words):
    file = rows(tmp_path / "a.jsonl", 3)
    file.write_text(file.read_text() + "\n" + line + "\n")
    with pytest.raises(DataError) as caught:
        task(file)
    assert f"({file}:5)" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_invalid_utf8_is_a_bad_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"prompt": "\xff", "answer": "1"}\n')
    with pytest.raises(DataError, match=r"not JSON.*a\.jsonl:1"):
        task(file)


def test_an_empty_or_missing_file_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no prompt to train on"):
        task(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="no such file"):
        task(tmp_path / "b.jsonl")


def test_too_long_prompts_are_left_out_and_counted(tmp_path, caplog):
    short = task(rows(tmp_path / "a.jsonl"), heldout_fraction=0.0, max_prompt_tokens=11)
    assert short.too_long == 30
    assert len(short.splits["train"]) == 10
    assert "30 prompts have more than 11 tokens" in caplog.text
    with pytest.raises(DataError, match="40 prompts longer than 5 tokens"):
        task(rows(tmp_path / "a.jsonl"), max_prompt_tokens=5)


def test_an_empty_heldout_split_is_an_error_when_it_is_used(tmp_path):
    whole = task(rows(tmp_path / "a.jsonl"), heldout_fraction=0.0)
    with pytest.raises(DataError, match=r"evaluate\.every = 0"):
        whole.prompts("heldout", 0)


def test_the_chat_template_wraps_the_prompt(tmp_path):
    chat = task(rows(tmp_path / "a.jsonl"), heldout_fraction=0.0, chat_template=True, system_prompt="Be brief.")
    assert chat.splits["train"][0].text == "<system>Be brief.<user>What is 0?<assistant>"
    assert chat.splits["train"][0].input_ids[0] == ord("<")


@pytest.mark.parametrize(
    ("verifier", "answer", "response", "score"),
    [
        ("exact", "Paris", " Paris\n", 1.0),
        ("exact", "Paris", "paris", 0.0),
        ("number", "1234", "So it is 1,234.", 1.0),
        ("number", "#### 72", "half of 144 is 72.0", 1.0),
        ("number", "2", "5-2 = 3", 0.0),
        ("number", "-3", "x = -3", 1.0),
        ("number", "3", "nothing", 0.0),
        ("regex", r"\bParis\b", "It is Paris.", 1.0),
        ("regex", r"\bParis\b", "Parisian", 0.0),
    ],
)
def test_verifiers_by_name(tmp_path, verifier, answer, response, score):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "q", "answer": answer}))
    jsonl = task(file, verifier=verifier, heldout_fraction=0.0)
    verdict = jsonl.verify(jsonl.splits["train"][0], answered(response))
    assert verdict.score == score
    assert verdict.correct == (score == 1.0)
    assert jsonl.verify(jsonl.splits["train"][0], answered(response, "length")).score == 0.0


def test_a_verifier_from_a_file_may_return_none(tmp_path):
    (tmp_path / "judge.py").write_text(
        "def judge(prompt, response, answer):\n    return None if response == '?' else 0.5\n"
    )
    jsonl = task(rows(tmp_path / "a.jsonl"), verifier=f"{tmp_path}/judge.py:judge", heldout_fraction=0.0)
    prompt = jsonl.splits["train"][0]
    assert jsonl.verify(prompt, answered("x")).score == 0.5
    assert not jsonl.verify(prompt, answered("x")).correct
    assert jsonl.verify(prompt, answered("?")).score is None


@pytest.mark.parametrize(("verifier", "answer"), [("number", "none"), ("regex", "(")])
def test_an_answer_that_a_verifier_cannot_use_is_a_bad_line(tmp_path, verifier, answer):
    file = rows(tmp_path / "a.jsonl", 3)
    file.write_text(file.read_text() + json.dumps({"prompt": "q", "answer": answer}) + "\n")
    with pytest.raises(DataError, match=rf"task\.verifier = {verifier}.*a\.jsonl:4"):
        task(file, verifier=verifier)


@pytest.mark.parametrize("value", ["'1'", "float('nan')"])
def test_a_verifier_that_returns_no_number_leaves_the_response_unverified(tmp_path, value):
    (tmp_path / "judge.py").write_text(f"def judge(prompt, response, answer):\n    return {value}\n")
    jsonl = task(rows(tmp_path / "a.jsonl"), verifier=f"{tmp_path}/judge.py:judge", heldout_fraction=0.0)
    verdict = jsonl.verify(jsonl.splits["train"][0], answered("x"))
    assert (verdict.score, verdict.failure) == (None, "invalid")
    assert "judge.py:judge (task.verifier) returned" in verdict.reason


@pytest.mark.parametrize(
    ("verifier", "words"),
    [
        ("exat", "did you mean exact?"),
        ("zzz", "one of exact, number, regex"),
        ("{}/none.py:f", "no such file"),
        ("{}/judge.py:f", "no function or class f in"),
        ("{}/judge.py:two", "it must take prompt, response, answer"),
    ],
)
def test_an_unknown_verifier_is_an_error_before_any_file_is_read(tmp_path, verifier, words):
    (tmp_path / "judge.py").write_text("def two(a, b):\n    pass\n")
    with pytest.raises(ConfigError, match=r"task\.verifier") as caught:
        task(tmp_path / "missing.jsonl", verifier=verifier.format(tmp_path))
    assert words in str(caught.value)
