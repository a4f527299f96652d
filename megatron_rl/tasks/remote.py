"""A verifier behind HTTP: one POST a response, or one for many; tried again while there is time.

-> {"id": "0.3/p17/2", "prompt": "...", "response": "...", "answer": "...", "metadata": {}}
<- {"score": 1.0}    or {"score": null}; "correct" (else: score >= 1) and "reason" if it likes

With ``reward.http_batch`` above 1 both are lists, in any order; what belongs together has one id:

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
"""Before the second attempt; each pause is twice the one before."""

RETRIED_STATUS_CODES = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
"""Answers that may be others later, with all from 500 on."""

MAX_ANSWER_BYTES = 1 << 20
"""Of an answer, for each response."""

Job = tuple[Prompt, Response]
RequestItems = Mapping[str, int]
"""Jobs of one request: the place of each by its id."""


class RetryableError(Exception):
    """There was no answer, or one that may be another later.

    Attributes:
        broke: the server failed at this very request (500): a smaller one may do.
    """

    def __init__(self, why: str, *, broke: bool = False) -> None:
        super().__init__(why)
        self.broke = broke


class RemoteVerifier:
    """Asks a server what responses are worth."""

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.seconds = url, seconds

    def __call__(self, prompt: Prompt, response: Response) -> Verdict:
        """Return the server's verdict; TimeoutError if none came in time, DataError if it is none."""
        deadline, pause = time.monotonic() + self.seconds, FIRST_PAUSE_SECONDS
        body = json.dumps(_item(prompt, response)).encode()
        while True:
            try:
                return self._verdict(self._post(body, deadline))
            except RetryableError as error:
                if time.monotonic() + pause > deadline:
                    raise TimeoutError(self._silence(self.seconds, error)) from error
            time.sleep(pause)
            pause *= 2

    def ask(self, jobs: Sequence[Job], seconds: float) -> list[Verdict]:
        """Return the verdicts on many responses within ``seconds``; what fails is unverified, the others are not.

        A request that the server refuses, answers wrongly or breaks at (500) is halved, down to the response that it
        is about.
        """
        deadline, pause, last = time.monotonic() + seconds, FIRST_PAUSE_SECONDS, RetryableError("nothing was asked")
        found: dict[int, Verdict] = {}
        parts = deque(_parts(jobs))
        while parts and time.monotonic() < deadline:
            part = parts.popleft()
            body = json.dumps({"items": [_item(*jobs[place]) for place in part.values()]}).encode()
            try:
                found |= self._verdicts(self._post(body, deadline, len(part)), part)
            except DataError as error:
                if len(part) > 1:
                    parts += _halves(part)
                else:
                    found |= {place: unverified("raised", str(error)) for place in part.values()}
            except RetryableError as error:
                last, divides = error, error.broke and len(part) > 1
                parts += _halves(part) if divides else [part]
                time.sleep(min(FIRST_PAUSE_SECONDS if divides else pause, max(deadline - time.monotonic(), 0.0)))
                pause *= 1 if divides else 2
        late = unverified("timed_out", self._silence(seconds, last))
        return [found.get(place, late) for place in range(len(jobs))]

    def _silence(self, seconds: float, last: RetryableError) -> str:
        return f"{self.url} gave no answer in {seconds:g} s; last: {last}"

    def _post(self, body: bytes, deadline: float, items: int = 1) -> bytes:
        """Return the answer to one request; raise NotNow, or DataError where asking again is no use."""
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=max(deadline - time.monotonic(), 0.01)) as answer:
                return answer.read(MAX_ANSWER_BYTES * items)
        except urllib.error.HTTPError as error:
            why = f"{error.code} {error.reason}"
            if error.code not in RETRIED_STATUS_CODES and error.code < HTTPStatus.INTERNAL_SERVER_ERROR:
                raise DataError(f"{self.url} refuses: {why}") from error
            raise RetryableError(why, broke=error.code == HTTPStatus.INTERNAL_SERVER_ERROR) from error
        except (HTTPException, OSError) as error:  # URLError is an OSError
            raise RetryableError(str(error) or type(error).__name__) from error

    def _verdict(self, raw: bytes) -> Verdict:
        answer = self._object(raw)
        if "score" not in answer:
            raise DataError(f"{self.url} answers {raw[:80]!r}; it must answer an object with score")
        return _worth(answer)

    def _verdicts(self, raw: bytes, part: RequestItems) -> dict[int, Verdict]:
        """Return the verdicts by place; a response that the answer is silent about, or speaks twice of, has none."""
        items = self._object(raw).get("items")
        if not isinstance(items, list):
            raise DataError(f"{self.url} answers {raw[:80]!r}; it must answer an object with a list of items")
        said: dict[str, list[Mapping[str, object]]] = {name: [] for name in part}
        for item in items:
            if isinstance(item, dict) and item.get("id") in said:
                said[str(item["id"])].append(item)
        return {place: self._only(said[name]) for name, place in part.items()}

    def _only(self, said: Sequence[Mapping[str, object]]) -> Verdict:
        if len(said) == 1 and "score" in said[0]:
            return _worth(said[0])
        why = f"{len(said)} items" if len(said) != 1 else "no score"
        return unverified("invalid", f"{self.url} answers with {why} for this response; it must be one item with score")

    def _object(self, raw: bytes) -> Mapping[str, object]:
        try:
            answer = json.loads(raw)
        except ValueError as error:
            raise DataError(f"{self.url} answers no JSON: {raw[:80]!r}") from error
        if not isinstance(answer, dict):
            raise DataError(f"{self.url} answers {raw[:80]!r}; it must answer an object")
        return answer


def _item(prompt: Prompt, response: Response) -> Mapping[str, object]:
    return {
        "id": response.id,
        "prompt": prompt.text,
        "response": response.answer_text,
        "answer": prompt.answer,
        "metadata": dict(prompt.metadata),
    }


def _worth(answer: Mapping[str, object]) -> Verdict:
    score, reason = answer["score"], str(answer.get("reason", ""))
    if score is None:
        return Verdict(None, False, reason or "the server could not tell", "declined")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        return unverified("invalid", f"the server gave {score!r}")
    return Verdict(float(score), bool(answer.get("correct", score >= 1)), reason)


def _parts(jobs: Sequence[Job]) -> Iterator[RequestItems]:
    """Yield the jobs as one request, or as more where an id is there twice."""
    left = list(enumerate(jobs))
    while left:
        part: dict[str, int] = {}
        again: list[tuple[int, Job]] = []
        for place, job in left:
            if job[1].id in part:
                again.append((place, job))
            else:
                part[job[1].id] = place
        yield part
        left = again


def _halves(part: RequestItems) -> list[RequestItems]:
    names, middle = list(part), len(part) // 2
    return [{name: part[name] for name in half} for half in (names[:middle], names[middle:])]
