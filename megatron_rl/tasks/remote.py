"""A verifier behind HTTP: one POST request per response or per batch, retried until the time limit.

-> {"id": "0.3/p17/2", "prompt": "...", "response": "...", "answer": "...", "metadata": {}}
<- {"score": 1.0}    or {"score": null}; optional: "correct" (default: score >= 1) and "reason"

If ``reward.http_batch`` is above 1, both are lists in any order, matched by id:

-> {"items": [{"id": "0.3/p17/2", ...}, ...]}
<- {"items": [{"id": "0.3/p17/2", "score": 1.0}, ...]}
"""

import json
import math
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from http.client import HTTPException

from megatron_rl.data.types import Prompt, Response
from megatron_rl.errors import DataError
from megatron_rl.tasks.base import Verdict, unverified

FIRST_PAUSE_SECONDS = 0.1
"""Pause before the second attempt; it doubles with each attempt."""

RETRIED_STATUS_CODES = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
"""Status codes, in addition to those from 500 on, after which a request is tried again."""

MAX_ANSWER_BYTES = 1 << 20
"""Limit of the size of an answer, per response in the request."""

Job = tuple[Prompt, Response]
RequestItems = Mapping[str, int]
"""The jobs of one request: response id -> index of the job."""


class RetryableError(Exception):
    """A request failed and may succeed later.

    Attributes:
        server_error: the server answered 500: a smaller batch may succeed.
    """

    def __init__(self, reason: str, *, server_error: bool = False) -> None:
        super().__init__(reason)
        self.server_error = server_error


class RemoteVerifier:
    """Asks a server for the scores of responses."""

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.seconds = url, seconds

    def __call__(self, prompt: Prompt, response: Response) -> Verdict:
        """Return the server's verdict on one response.

        Raises:
            TimeoutError: the server did not answer in time.
            DataError: the server rejected the request, or its answer is invalid.
        """
        deadline, pause = time.monotonic() + self.seconds, FIRST_PAUSE_SECONDS
        body = json.dumps(_item(prompt, response)).encode()
        while True:
            try:
                return self._parse_verdict(self._post(body, deadline))
            except RetryableError as error:
                if time.monotonic() + pause > deadline:
                    raise TimeoutError(self._no_answer(self.seconds, error)) from error
            time.sleep(pause)
            pause *= 2

    def verify_batch(self, jobs: Sequence[Job], seconds: float) -> list[Verdict]:
        """Return the verdicts on many responses within ``seconds``; responses that fail are unverified.

        A request that the server rejects, answers incorrectly or fails at (500) is split in half, repeatedly, until the
        response that causes the failure is alone in a request.
        """
        deadline, pause, last = time.monotonic() + seconds, FIRST_PAUSE_SECONDS, RetryableError("no request was sent")
        verdicts: dict[int, Verdict] = {}
        requests = deque(_requests(jobs))
        while requests and time.monotonic() < deadline:
            items = requests.popleft()
            body = json.dumps({"items": [_item(*jobs[index]) for index in items.values()]}).encode()
            try:
                verdicts |= self._parse_verdicts(self._post(body, deadline, len(items)), items)
            except DataError as error:
                if len(items) > 1:
                    requests += _halves(items)
                else:
                    verdicts |= {index: unverified("raised", str(error)) for index in items.values()}
            except RetryableError as error:
                last, split = error, error.server_error and len(items) > 1
                requests += _halves(items) if split else [items]
                time.sleep(min(FIRST_PAUSE_SECONDS if split else pause, max(deadline - time.monotonic(), 0.0)))
                pause *= 1 if split else 2
        late = unverified("timed_out", self._no_answer(seconds, last))
        return [verdicts.get(index, late) for index in range(len(jobs))]

    def _no_answer(self, seconds: float, last: RetryableError) -> str:
        return f"{self.url} gave no answer in {seconds:g} s; last error: {last}"

    def _post(self, body: bytes, deadline: float, num_items: int = 1) -> bytes:
        """Return the answer to one request.

        Raises:
            RetryableError: the request failed and may succeed later.
            DataError: the server rejects the request.
        """
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=max(deadline - time.monotonic(), 0.01)) as answer:
                return answer.read(MAX_ANSWER_BYTES * num_items)
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code not in RETRIED_STATUS_CODES and error.code < HTTPStatus.INTERNAL_SERVER_ERROR:
                raise DataError(f"{self.url} rejects the request: {reason}") from error
            raise RetryableError(reason, server_error=error.code == HTTPStatus.INTERNAL_SERVER_ERROR) from error
        except (HTTPException, OSError) as error:  # URLError is an OSError
            raise RetryableError(str(error) or type(error).__name__) from error

    def _parse_verdict(self, raw: bytes) -> Verdict:
        answer = self._parse_object(raw)
        if "score" not in answer:
            raise DataError(f"{self.url} answered {raw[:80]!r}; the answer must be an object with score")
        return _to_verdict(answer)

    def _parse_verdicts(self, raw: bytes, requested: RequestItems) -> dict[int, Verdict]:
        """Return verdicts by index of the job. A response with no item or several items in the answer is unverified."""
        items = self._parse_object(raw).get("items")
        if not isinstance(items, list):
            raise DataError(f"{self.url} answered {raw[:80]!r}; the answer must be an object with a list of items")
        items_by_id: dict[str, list[Mapping[str, object]]] = {name: [] for name in requested}
        for item in items:
            if isinstance(item, dict) and item.get("id") in items_by_id:
                items_by_id[str(item["id"])].append(item)
        return {index: self._single_verdict(items_by_id[name]) for name, index in requested.items()}

    def _single_verdict(self, items: Sequence[Mapping[str, object]]) -> Verdict:
        if len(items) == 1 and "score" in items[0]:
            return _to_verdict(items[0])
        problem = f"{len(items)} items" if len(items) != 1 else "no score"
        return unverified(
            "invalid", f"{self.url} answered with {problem} for this response; there must be one item with score"
        )

    def _parse_object(self, raw: bytes) -> Mapping[str, object]:
        try:
            answer = json.loads(raw)
        except ValueError as error:
            raise DataError(f"{self.url} answered something that is not JSON: {raw[:80]!r}") from error
        if not isinstance(answer, dict):
            raise DataError(f"{self.url} answered {raw[:80]!r}; the answer must be an object")
        return answer


def _item(prompt: Prompt, response: Response) -> Mapping[str, object]:
    return {
        "id": response.id,
        "prompt": prompt.text,
        "response": response.answer_text,
        "answer": prompt.answer,
        "metadata": dict(prompt.metadata),
    }


def _to_verdict(answer: Mapping[str, object]) -> Verdict:
    score, reason = answer["score"], str(answer.get("reason", ""))
    if score is None:
        return Verdict(None, False, reason or "the server gave no score", "declined")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        return unverified("invalid", f"the server gave {score!r}")
    return Verdict(float(score), bool(answer.get("correct", score >= 1)), reason)


def _requests(jobs: Sequence[Job]) -> Iterator[RequestItems]:
    """Yield the jobs as one request, or as several if response ids repeat."""
    left = list(enumerate(jobs))
    while left:
        items: dict[str, int] = {}
        repeated: list[tuple[int, Job]] = []
        for index, job in left:
            if job[1].id in items:
                repeated.append((index, job))
            else:
                items[job[1].id] = index
        yield items
        left = repeated


def _halves(items: RequestItems) -> list[RequestItems]:
    names, middle = list(items), len(items) // 2
    return [{name: items[name] for name in half} for half in (names[:middle], names[middle:])]
