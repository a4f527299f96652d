"""A verifier behind HTTP: one POST a response, tried again while there is time.

-> {"id": "0.3/p17/2", "prompt": "...", "response": "...", "answer": "...", "metadata": {}}
<- {"score": 1.0}    or {"score": null}; "correct" (else: score >= 1) and "reason" if it likes
"""

import json
import math
import time
import urllib.error
import urllib.request
from http import HTTPStatus
from http.client import HTTPException

from megatron_rl.data.types import Prompt, Response
from megatron_rl.errors import DataError
from megatron_rl.tasks.base import Verdict

FIRST_PAUSE_SECONDS = 0.1
"""Before the second attempt; each pause is twice the one before."""

RETRIED = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
"""Answers that may be others later, with all from 500 on."""

MOST_BYTES = 1 << 20
"""Of an answer."""


class RemoteVerifier:
    """Asks a server what a response is worth."""

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.seconds = url, seconds

    def __call__(self, prompt: Prompt, response: Response) -> Verdict:
        """Return the server's verdict; TimeoutError if none came in time, DataError if it is none."""
        body = {
            "id": response.id,
            "prompt": prompt.text,
            "response": response.answer_text,
            "answer": prompt.answer,
            "metadata": dict(prompt.metadata),
        }
        return self._verdict(self._ask(json.dumps(body).encode()))

    def _ask(self, body: bytes) -> bytes:
        deadline, pause = time.monotonic() + self.seconds, FIRST_PAUSE_SECONDS
        while True:
            request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
            left = max(deadline - time.monotonic(), 0.01)
            try:
                with urllib.request.urlopen(request, timeout=left) as answer:
                    return answer.read(MOST_BYTES)
            except urllib.error.HTTPError as error:
                if error.code not in RETRIED and error.code < HTTPStatus.INTERNAL_SERVER_ERROR:
                    raise DataError(f"{self.url} refuses: {error.code} {error.reason}") from error
                why = f"{error.code} {error.reason}"
            except (HTTPException, OSError) as error:  # URLError is an OSError
                why = str(error) or type(error).__name__
            if time.monotonic() + pause > deadline:
                raise TimeoutError(f"{self.url} gave no answer in {self.seconds:g} s; last: {why}")
            time.sleep(pause)
            pause *= 2

    def _verdict(self, raw: bytes) -> Verdict:
        try:
            answer = json.loads(raw)
        except ValueError as error:
            raise DataError(f"{self.url} answers no JSON: {raw[:80]!r}") from error
        if not isinstance(answer, dict) or "score" not in answer:
            raise DataError(f"{self.url} answers {raw[:80]!r}; it must answer an object with score")
        score, reason = answer["score"], str(answer.get("reason", ""))
        if score is None:
            return Verdict(None, False, reason or "the server could not tell", "declined")
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            return Verdict(None, False, f"the server gave {score!r}", "invalid")
        return Verdict(float(score), bool(answer.get("correct", score >= 1)), reason)
