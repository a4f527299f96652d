"""Rewards and verifying processes. A verifier that fails leaves one response unverified and nothing else."""

import json
import os
import signal
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pytest
import torch

from megatron_rl.algorithms.advantages import overlong_penalty
from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.config.tasks import EnvironmentConfig, JsonlTask, Reward
from megatron_rl.data.types import Group, Prompt, Response
from megatron_rl.errors import ConfigError
from megatron_rl.rollout.collect import collect
from megatron_rl.rollout.records import failure_counts, reward_means, unverified_message
from megatron_rl.tasks import check_task
from megatron_rl.tasks.base import Verdict
from megatron_rl.tasks.open_verifier import open_verifier
from megatron_rl.tasks.pool import InlineVerifier, VerifierPool
from megatron_rl.tasks.reward import RewardFunction, runs_inline

PROMPT = Prompt("p", (1, 2), "q", "7")


def response(text: str, index: int = 0, tokens: int = 4, finish: str = "stop", **more) -> Response:
    ids, logprobs = tuple(range(tokens)), (-1.0,) * tokens
    return Response(
        f"r/{index}", "p", index, np.array(ids), np.array(logprobs), text, finish, ((0, 0, tokens),), **more
    )


def group(*texts: str) -> Group:
    return Group(PROMPT, tuple(response(text, index) for index, text in enumerate(texts)))


def run_of(folder: Path, *words: str) -> Run:
    (folder / "a.jsonl").write_text("")
    task = ['task.name="jsonl"', f"task.path={folder}/a.jsonl"]
    return load(Run, [], ["model.path=x", *task, "rollout.sampling.max_new_tokens=8", *words]).run


VERIFIER = """
import math, os, sys, time
def judge(prompt, response, answer):
    print("said")
    match response:
        case "raise": raise RuntimeError("bad luck")
        case "exit": sys.exit(3)
        case "die": os.kill(os.getpid(), 9)
        case "sleep": time.sleep(1000)
        case "spin":
            while True: pass
        case "nan": return math.nan
        case "inf": return math.inf
        case "text": return "1"
        case "none": return None
        case "hog": return len(bytearray(1 << 40))
        case "child":
            if os.fork() == 0: time.sleep(1000)
            time.sleep(1000)
    return float(response == answer)
"""


@pytest.fixture
def run_with_verifier(tmp_path):
    (tmp_path / "judge.py").write_text(VERIFIER)
    return run_of(tmp_path, f"task.verifier={tmp_path}/judge.py:judge", "reward.seconds=2", "reward.workers=2")


@pytest.mark.processes
def test_a_failing_verifier_is_counted_and_affects_one_response(run_with_verifier):
    texts = ["7", "raise", "sleep", "8", "exit", "die", "spin", "nan", "7", "inf", "text", "none", "hog", "child", "7"]
    before = {child.pid for child in psutil.Process().children()}
    with closing(VerifierPool(run_with_verifier)) as pool:
        verdicts = pool.submit([group(*texts), group("7")]).result(60)
        processes = [child for child in psutil.Process().children() if child.pid not in before]
        family = [*processes, *(grandchild for child in processes for grandchild in child.children(recursive=True))]
    assert dict(zip(texts, verdicts[0], strict=True))["7"].score == 1.0
    found = {text: (v.score, v.failure) for text, v in zip(texts, verdicts[0], strict=True)}
    assert found == {
        "7": (1.0, ""),
        "8": (0.0, ""),
        "raise": (None, "raised"),
        "exit": (None, "raised"),
        "die": (None, "raised"),
        "hog": (None, "raised"),
        "sleep": (None, "timed_out"),
        "spin": (None, "timed_out"),
        "child": (None, "timed_out"),
        "nan": (None, "invalid"),
        "inf": (None, "invalid"),
        "text": (None, "invalid"),
        "none": (None, "declined"),
    }
    assert verdicts[1][0].score == 1.0
    assert "RuntimeError: bad luck" in verdicts[0][1].reason
    assert "reward.seconds" in verdicts[0][2].reason
    assert failure_counts(verdicts[0]) == {
        "unverified_declined": 1,
        "unverified_raised": 4,
        "unverified_timed_out": 3,
        "unverified_invalid": 3,
        "unverified_environment": 0,
    }
    words = unverified_message(3, verdicts[0])
    assert words is not None
    assert words.startswith(
        "step 3: 10 of 15 responses unverified (4 raised, 3 timed out, 3 invalid); the first: Runtime"
    )
    psutil.wait_procs(family, timeout=10)
    assert not [process for process in family if process.is_running()]


@pytest.mark.processes
def test_verdicts_do_not_depend_on_the_number_of_processes(tmp_path, run_with_verifier):
    texts = ["7", "8", "nan", "none"] * 400 + ["raise"] * 3  # more than the capacity of the pipes
    with (
        closing(VerifierPool(run_with_verifier)) as two,
        closing(VerifierPool(run_of(tmp_path, f"task.verifier={tmp_path}/judge.py:judge"))) as one,
    ):
        assert two.submit([group(*texts)]).result(60) == one.submit([group(*texts)]).result(60)


@pytest.mark.processes
def test_killed_verifying_processes_are_asked_again_and_the_verdicts_are_the_same(run_with_verifier):
    texts = ["7", "sleep", "8", "raise", "7"]
    with closing(VerifierPool(run_with_verifier)) as pool:
        undisturbed = pool.submit([group(*texts)]).result(60)
        assert pool._process is not None
        pending = pool.submit([group(*texts)])
        os.kill(pool._process.pid, signal.SIGKILL)
        assert pending.result(60) == undisturbed


@pytest.mark.processes
def test_a_job_that_ends_the_verifying_processes_each_time_stays_unverified(tmp_path):
    (tmp_path / "judge.py").write_text(
        "import os\ndef judge(p, r, a):\n    os.kill(os.getppid(), 9)\n    os._exit(1)\n"
    )
    run = run_of(tmp_path, f"task.verifier={tmp_path}/judge.py:judge", "reward.workers=1")
    with closing(VerifierPool(run)) as pool:
        assert pool.submit([group("7")]).result(60)[0][0].reason == "the verifying processes ended 4 times"


@pytest.mark.processes
def test_an_error_text_with_half_a_surrogate_pair_can_be_written(tmp_path):
    (tmp_path / "judge.py").write_text("def judge(p, r, a):\n    raise ValueError('\\ud83d')\n")
    run = run_of(tmp_path, f"task.verifier={tmp_path}/judge.py:judge", "reward.workers=1")
    with closing(VerifierPool(run)) as pool:
        assert pool.submit([group("7")]).result(60)[0][0].reason == "ValueError: ?"


def test_verification_is_inline_only_if_no_verifier_can_hang(tmp_path):
    assert isinstance(open_verifier(run_of(tmp_path)), InlineVerifier)
    for words in ("task.verifier=number", "reward.overlong_tokens=2", 'reward.verifiers={ a = "exact" }'):
        run = run_of(tmp_path, words)
        assert runs_inline(run.task, run.reward)
    others = ("task.verifier=regex", "task.verifier=math", "reward.format=think", 'reward.verifiers={ a = "number" }')
    for words in others:
        run = run_of(tmp_path, words)
        assert not runs_inline(run.task, run.reward)


def reward_function(tmp_path: Path, *words: str) -> RewardFunction:
    run = run_of(tmp_path, *words)
    return RewardFunction(run.task, run.reward, run.rollout.sampling.max_new_tokens)


@pytest.mark.parametrize(
    ("answer", "text", "score"),
    [
        ("1/2", r"so \boxed{\frac{1}{2}}", 1.0),
        (r"\frac{1}{2}", "it is $0.5$", 1.0),
        (r"\{1,2\}", r"$\{2,1\}$", 1.0),
        ("(x+1)^2", "$x^2+2x+1$", 1.0),
        (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}", 1.0),
        ("[1,2)", "$[1,2)$", 1.0),
        ("#### 72", "the answer is 72", 1.0),
        ("1,234", "1234", 1.0),
        ("3", "the answer is 4", 0.0),
        ("(x+1)^2", "$x^2+1$", 0.0),
        ("5", "", 0.0),
    ],
)
def test_math_answers(tmp_path, answer, text, score):
    verdict = reward_function(tmp_path, "task.verifier=math").verify(Prompt("p", (), "q", answer), response(text))
    assert (verdict.score, verdict.correct) == (score, score == 1.0)


def test_the_score_is_the_weighted_sum_of_rewards(tmp_path):
    words = ["reward.format='A=.*'", "reward.overlong_tokens=4", 'reward.verifiers={ short = "number" }']
    reward_fn = reward_function(
        tmp_path, "task.verifier=regex", *words, "reward.weights={ format = 0.5, short = 2, task = 3 }"
    )
    verdict = reward_fn.verify(PROMPT, response("A=7", tokens=6))
    assert dict(verdict.rewards) == {"task": 1.0, "short": 1.0, "format": 1.0, "overlong": -0.5}
    assert verdict.score == 3 + 2 + 0.5 - 0.5
    assert verdict.correct
    doubled = reward_function(tmp_path, "task.verifier=number", "reward.weights={ task = 2 }").verify(
        PROMPT, response("is 7")
    )
    assert (doubled.score, doubled.answer) == (2.0, "7")  # the extracted answer, for majority votes
    cut = reward_fn.verify(PROMPT, response("7", tokens=8, finish="length"))
    assert dict(cut.rewards) == {"task": 0.0, "short": 0.0, "format": 0.0, "overlong": -1.0}
    assert reward_means([verdict, cut])["reward/overlong"] == -0.75
    lengths = torch.arange(9)
    shaped = [reward_fn.verify(PROMPT, response("x", tokens=n)).rewards["overlong"] for n in range(9)]
    assert shaped == overlong_penalty(lengths, 8, 4).tolist()


def test_the_format_think_needs_both_tags_in_order(tmp_path):
    reward_fn = reward_function(tmp_path, "reward.format=think")
    for text, reward in (
        ("<think>a\nb</think>\n<answer>7</answer>\n", 1.0),
        ("<answer>7</answer><think>a</think>", 0.0),
        ("<think>a</think>7", 0.0),
    ):
        assert reward_fn.verify(PROMPT, response(text)).rewards["format"] == reward


def test_one_reward_that_fails_leaves_the_response_unverified(tmp_path):
    (tmp_path / "judge.py").write_text(VERIFIER)
    reward_fn = reward_function(tmp_path, f'reward.verifiers={{ other = "{tmp_path}/judge.py:judge" }}')
    verdict = reward_fn.verify(PROMPT, response("nan"))
    assert (verdict.score, verdict.failure) == (None, "invalid")


def test_gdpo_normalizes_each_reward(tmp_path):
    base = ["reward.format=.*", "reward.weights={ format = 0.01 }"]
    run, summed = (run_of(tmp_path, *base, f"advantage.kind={kind}") for kind in ("gdpo", "zscore"))
    groups = [group("a", "b", "c", "d"), group("a", "b", "c", "d")]

    def verdict(task: float, form: float) -> Verdict:
        return Verdict(task + 0.01 * form, False, rewards={"task": task, "format": form})

    same = [verdict(1, 1)] * 4
    mixed = [verdict(1, 0), verdict(1, 1), verdict(0, 0), verdict(0, 1)]
    found = collect(groups, [mixed, same], run)["advantages_B"]
    assert found[4:].tolist() == [0.0] * 4  # exactly 0: the responses of the group have equal rewards
    scores = torch.tensor([1.0, 1, -1, -1]) * (3 / 4) ** 0.5 + 0.01 * torch.tensor([-1.0, 1, -1, 1]) * (3 / 4) ** 0.5
    expected = torch.cat([scores, torch.zeros(4)]).double()
    torch.testing.assert_close(found, expected / (expected.std() + 1e-6), atol=1e-5, rtol=0)  # 1e-6 in two deviations
    assert not torch.allclose(found, collect(groups, [mixed, same], summed)["advantages_B"], atol=1e-2)


class Server(BaseHTTPRequestHandler):
    requests: ClassVar[list[dict[str, object]]] = []
    stumbles = 0

    def do_POST(self):
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).requests.append(message)
        text = message["response"]
        if text == "stumble" and type(self).stumbles < 2:
            type(self).stumbles += 1
            self.send_response(503)
            self.end_headers()
            return
        if text == "hang":
            time.sleep(3)
        self.send_response(400 if text == "refuse" else 200)
        self.end_headers()
        answers = {"no json": b"hello", "null": b'{"score": null}', "nan": b'{"score": NaN}', "list": b"[1]"}
        self.wfile.write(answers.get(text, b'{"score": 0.5, "correct": true, "reason": "fair"}'))

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server():
    Server.requests.clear()
    Server.stumbles = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as reward_fn:
        thread = threading.Thread(target=reward_fn.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{reward_fn.server_address[1]}/judge"
        reward_fn.shutdown()
        thread.join()


@pytest.mark.processes
def test_an_http_verifier_is_retried_and_its_failures_are_counted(tmp_path, server):
    run = run_of(tmp_path, f"task.verifier={server}", "reward.seconds=2", "reward.workers=3")
    texts = ["fine", "stumble", "refuse", "no json", "null", "nan", "list", "hang"]
    with closing(VerifierPool(run)) as pool:
        verdicts = pool.submit([group(*texts)]).result(60)[0]
    found = {text: (v.score, v.correct, v.failure) for text, v in zip(texts, verdicts, strict=True)}
    assert found == {
        "fine": (0.5, True, ""),
        "stumble": (0.5, True, ""),
        "refuse": (None, False, "raised"),
        "no json": (None, False, "raised"),
        "list": (None, False, "raised"),
        "null": (None, False, "declined"),
        "nan": (None, False, "invalid"),
        "hang": (None, False, "timed_out"),
    }
    assert Server.requests[0].keys() == {"id", "prompt", "response", "answer", "metadata"}


@pytest.mark.processes
def test_an_unreachable_http_verifier_times_out(tmp_path):
    run = run_of(tmp_path, "task.verifier=http://127.0.0.1:9/", "reward.seconds=1")
    with closing(VerifierPool(run)) as pool:
        verdict = pool.submit([group("x")]).result(60)[0][0]
    assert verdict.failure == "timed_out"
    assert "gave no answer" in verdict.reason


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["task.verifier=code"], "reward.allow_code = true"),
        (["task.verifier=maths"], "did you mean math?"),
        (['reward.verifiers={ a = "b.py:c" }'], "reward.verifiers.a"),
    ],
)
def test_a_verifier_that_cannot_be_used_is_an_error_before_any_work(tmp_path, words, found):
    run = run_of(tmp_path, *words)
    assert any(found in problem for problem in check_task(run.task, run.reward, run.environment))


def test_import_errors_and_missing_packages_are_reported(tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text("import nothing_of_this_name\n")
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "q", "answer": "7"}\n')
    task = JsonlTask(path=str(file), verifier=f"{tmp_path}/judge.py:judge")
    assert "cannot be imported: ModuleNotFoundError" in next(check_task(task, Reward(), EnvironmentConfig()))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    problem = next(check_task(JsonlTask(path=str(file), verifier="math"), Reward(), EnvironmentConfig()))
    assert "pip install 'megatron-rl[tasks]'" in problem


def test_paths_of_verifiers_are_relative_to_the_configuration_file(tmp_path):
    (tmp_path / "a.toml").write_text('[model]\npath = "x"\n[reward.verifiers]\na = "b.py:c"\nd = "exact"\n')
    assert load(Run, [tmp_path / "a.toml"]).run.reward.verifiers == {"a": f"{tmp_path}/b.py:c", "d": "exact"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("advantage.kind=gdpo", "needs several rewards"),
        ("reward.overlong_tokens=9", "at most 8 tokens"),
        ("reward.weights={ fromat = 1 }", "no such reward; one of task"),
        ("reward.format=(", "not a regular expression"),
        ('reward.verifiers={ task = "exact" }', "the name is reserved"),
    ],
)
def test_invalid_rewards_are_errors(tmp_path, words, found):
    with pytest.raises(ConfigError) as caught:
        run_of(tmp_path, words)
    assert found in str(caught.value)
