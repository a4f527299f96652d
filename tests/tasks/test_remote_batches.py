"""HTTP verifiers with batches: a response that breaks a request does not affect the others, in any order."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.data.types import Group, Prompt, Response
from megatron_rl.errors import ConfigError
from megatron_rl.tasks.pool import VerifierPool
from megatron_rl.tasks.reward import RewardFunction

pytestmark = pytest.mark.processes

Items = list[dict[str, Any]]
Answer = Callable[[Items], tuple[int, object]]


class ScriptedScorer:
    """Answers requests with the function ``answer`` and records them."""

    def __init__(self) -> None:
        self.requests: list[Items] = []
        self.answer: Answer = scores

    def handle(self, body: bytes) -> tuple[int, bytes]:
        items = json.loads(body)["items"]
        self.requests.append(items)
        status, answer = self.answer(items)
        return status, answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    @property
    def sizes(self) -> list[int]:
        return [len(items) for items in self.requests]


def scores(items: Items) -> tuple[int, object]:
    """Return the number in each response as its score, in reverse order."""
    return 200, {"items": [{"id": i["id"], "score": float(i["response"])} for i in reversed(items)]}


@pytest.fixture
def server() -> Iterator[tuple[ScriptedScorer, str]]:
    scorer = ScriptedScorer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, body = scorer.handle(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield scorer, f"http://127.0.0.1:{http_server.server_address[1]}/judge"
        http_server.shutdown()
        thread.join()


def run_of(folder: Path, url: str, *words: str) -> Run:
    (folder / "a.jsonl").write_text("")
    task = ['task.name="jsonl"', f"task.path={folder}/a.jsonl", f"task.verifier={url}", "reward.http_batch=16"]
    return load(Run, [], ["model.path=x", *task, "rollout.sampling.max_new_tokens=8", *words]).run


def group(texts: Sequence[str], name: str = "p", finish: str = "stop") -> Group:
    prompt = Prompt(name, (1,), f"{name}?", "7", {"task": "sums"})
    return Group(
        prompt,
        tuple(
            Response(
                f"0.3/{name}/{index}", name, index, np.array((1, 2)), np.array((-1.0, -1.0)), text, finish, ((0, 0, 2),)
            )
            for index, text in enumerate(texts)
        ),
    )


def verdicts_of_pool(run: Run, *groups: Group) -> list[list[tuple[float | None, str]]]:
    """Return scores and failures, from verifying processes."""
    with closing(VerifierPool(run)) as pool:
        return [[(v.score, v.failure) for v in verdicts] for verdicts in pool.submit(groups).result(60)]


def verdicts_inline(run: Run, *groups: Group) -> list[list[tuple[float | None, str]]]:
    """Return scores and failures, from one request, without verifying processes."""
    reward_fn = RewardFunction(run.task, run.reward, run.rollout.sampling.max_new_tokens)
    jobs = [(group.prompt, response) for group in groups for response in group.responses]
    verdicts = (reward_fn.verify(*job, known) for job, known in zip(jobs, reward_fn.verify_batch(jobs), strict=True))
    return [[(v.score, v.failure) for v in islice(verdicts, len(group.responses))] for group in groups]


def test_every_response_gets_its_own_verdict_from_few_bounded_requests(tmp_path, server):
    scorer, url = server
    groups = [group([str(100 * name + index) for index in range(20)], f"p{name}") for name in range(10)]
    waiting = threading.Event()

    def answer(items: Items) -> tuple[int, object]:
        waiting.wait(60)  # responses accumulate while the first requests wait
        return scores(items)

    scorer.answer = answer
    with closing(VerifierPool(run_of(tmp_path, url, "reward.seconds=60"))) as pool:
        pending = pool.submit(groups)
        waiting.set()
        scores_by_group = [[(v.score, v.failure) for v in verdicts] for verdicts in pending.result(60)]
    assert scores_by_group == [[(100.0 * name + index, "") for index in range(20)] for name in range(10)]
    assert max(scorer.sizes) == 16
    assert sum(scorer.sizes) == 200
    assert len(scorer.sizes) < 100  # at least 13 full batches; the number of partial ones depends on timing
    first = next(item for items in scorer.requests for item in items if item["id"] == "0.3/p0/0")
    assert first == {
        "id": "0.3/p0/0",
        "prompt": "p0?",
        "response": "0",
        "answer": "7",
        "metadata": {"task": "sums"},
    }


def test_responses_with_equal_ids_are_sent_separately(tmp_path, server):
    _, url = server
    assert verdicts_inline(run_of(tmp_path, url), group("123"), group("456")) == [
        [(1.0, ""), (2.0, ""), (3.0, "")],
        [(4.0, ""), (5.0, ""), (6.0, "")],
    ]


def test_partial_failures_leave_single_responses_unverified(tmp_path, server):
    scorer, url = server

    def answer(items: Items) -> tuple[int, object]:
        special = {
            "nan": {"score": float("nan")},
            "null": {"score": None, "reason": "cannot tell"},
            "text": {"score": "1"},
            "none": {},
        }
        answers: list[object] = [{"id": "nobody's", "score": 1.0}, "rubbish"]
        for item in items:
            if item["response"] != "silent":
                answers.append({"id": item["id"], **special.get(item["response"], {"score": 0.5, "correct": True})})
            if item["response"] == "twice":
                answers.append({"id": item["id"], "score": 1.0})
        return 200, {"items": answers}

    scorer.answer = answer
    texts = ["a", "nan", "b", "null", "text", "none", "silent", "twice", "c"]
    (verdicts,) = verdicts_inline(run_of(tmp_path, url), group(texts))
    assert dict(zip(texts, verdicts, strict=True)) == {
        **dict.fromkeys("abc", (0.5, "")),
        "null": (None, "declined"),
        **dict.fromkeys(("nan", "text", "none", "silent", "twice"), (None, "invalid")),
    }


@pytest.mark.parametrize(
    ("status", "body", "failure"), [(500, b"", "timed_out"), (400, b"", "raised"), (200, b"hello", "raised")]
)
def test_only_the_response_that_breaks_the_server_is_unverified(tmp_path, server, status, body, failure):
    scorer, url = server
    scorer.answer = lambda items: (status, body) if any(i["response"] == "9" for i in items) else scores(items)
    run = run_of(tmp_path, url, "reward.seconds=4")
    (verdicts,) = verdicts_inline(run, group([str(number) for number in range(32)]))
    assert verdicts == [(None, failure) if number == 9 else (float(number), "") for number in range(32)]


def test_a_request_that_is_too_large_is_split(tmp_path, server):
    scorer, url = server
    scorer.answer = lambda items: (413, b"") if len(items) > 3 else scores(items)
    (verdicts,) = verdicts_inline(run_of(tmp_path, url), group([str(number) for number in range(40)]))
    assert verdicts == [(float(number), "") for number in range(40)]
    assert max(scorer.sizes) > 3


def test_requests_to_a_busy_server_are_retried(tmp_path, server):
    scorer, url = server
    refusals = iter([503, 429, 502])

    def answer(items: Items) -> tuple[int, object]:
        status = next(refusals, 0)
        return (status, b"") if status else scores(items)

    scorer.answer = answer
    assert verdicts_inline(run_of(tmp_path, url), group("123")) == [[(1.0, ""), (2.0, ""), (3.0, "")]]
    assert next(refusals, None) is None


def test_a_server_that_hangs_affects_one_request_only(tmp_path, server):
    scorer, url = server

    def answer(items: Items) -> tuple[int, object]:
        if any(i["response"] == "9" for i in items):
            time.sleep(2)
        return scores(items)

    scorer.answer = answer
    run = run_of(tmp_path, url, "reward.seconds=1", "reward.workers=1")
    with closing(VerifierPool(run)) as pool:
        late = pool.submit([group("9")])
        later = pool.submit([group("123", "q")])
        assert [v.failure for v in late.result(60)[0]] == ["timed_out"]
        # Part of the request that hangs or of a later one, depending on timing.
        assert {v.failure for v in later.result(60)[0]} <= {"", "timed_out"}
        assert [v.score for v in pool.submit([group("45", "r")]).result(60)[0]] == [4.0, 5.0]


def test_an_unreachable_server_times_out(tmp_path):
    verdicts = verdicts_inline(run_of(tmp_path, "http://127.0.0.1:9/", "reward.seconds=1"), group("123"))
    assert verdicts == [[(None, "timed_out")] * 3]


def test_a_failing_verifier_next_to_a_server_affects_one_response(tmp_path, server):
    scorer, url = server
    (tmp_path / "judge.py").write_text(
        "import os, time\n"
        "def judge(prompt, response, answer):\n"
        "    if response == '3': time.sleep(100)\n"
        "    if response == '5': os.kill(os.getpid(), 9)\n"
        "    if response == '7': raise RuntimeError('bad luck')\n"
        "    return 0.25\n"
    )
    words = [f'reward.verifiers={{ mine = "{tmp_path}/judge.py:judge", other = "{url}" }}', "reward.seconds=1.5"]
    (verdicts,) = verdicts_of_pool(run_of(tmp_path, url, *words), group([str(number) for number in range(10)]))
    failures = {3: "timed_out", 5: "raised", 7: "raised"}
    expected = [(None, failures[n]) if n in failures else (n + 0.25 + n, "") for n in range(10)]
    assert verdicts == expected
    assert sum(scorer.sizes) == 20  # each response was sent once


def test_responses_that_did_not_end_are_not_sent(tmp_path, server):
    scorer, url = server
    cut, lost = group("12", "p", "length"), group("34", "q", "failed")
    assert verdicts_inline(run_of(tmp_path, url), cut, lost) == [[(0.0, "")] * 2, [(None, "environment")] * 2]
    assert sum(scorer.sizes) == 0


def test_a_batch_size_of_zero_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="http_batch"):
        run_of(tmp_path, "http://127.0.0.1:9/", "reward.http_batch=0")
