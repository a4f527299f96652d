"""Multi-turn responses: the environment's messages are inserted between the model's turns, token by token.

    prompt --> turn --> environment --> turn --> ... --> environment is done: "stop"
                            |
                            +--> token or turn limit reached: "length";  it raised or took too long: "failed"

A turn is requested with all previous tokens unchanged: sampled tokens are never decoded and encoded again. Tokens of
the environment have log-prob 0 and no weight version; ``Response.observed`` has their spans.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import TracebackType

import numpy as np

from megatron_rl.data.environment import Environment
from megatron_rl.data.types import Prompt, Response, fold_seed
from megatron_rl.fleet.partial import continue_request, join_results
from megatron_rl.fleet.protocol import GenerationRequest, GenerationResult
from megatron_rl.fleet.request_plan import HttpRequest

log = logging.getLogger(__name__)

Generate = Callable[[Sequence[GenerationRequest]], Awaitable[list[GenerationResult]]]
Observation = str | Sequence[int] | None


Encode = Callable[[str, int], tuple[int, ...] | None]
"""Returns the tokens of the environment's text after a turn that ended with this token; None: the response ends."""


@dataclass
class Conversation:
    """One unfinished multi-turn response."""

    request: GenerationRequest
    environment: Environment
    result: GenerationResult
    turn_start: int = 0
    """Position in the output tokens where the newest turn of the model begins."""
    observed: list[tuple[int, int]] = field(default_factory=list)
    """Spans of output tokens that came from the environment."""
    open: bool = True

    def end(self, reason: str) -> None:
        """Finish the response with this reason."""
        self.result, self.open = replace(self.result, finish_reason=reason), False


@dataclass(frozen=True)
class MultiTurn:
    """Generates multi-turn responses.

    Attributes:
        make_environment: returns a new environment; called once per response.
        decode: returns the text of output tokens.
        encode: returns the tokens of a message of the environment, with the markers of the chat template.
        max_turns: maximum number of the model's turns in a response.
        timeout_seconds: time limit of the environment per turn.
    """

    make_environment: Callable[[], Environment]
    decode: Callable[[np.ndarray], str]
    encode: Encode
    max_turns: int
    timeout_seconds: float

    async def finish(
        self, request: HttpRequest, results: Sequence[GenerationResult], generate: Generate
    ) -> list[Response]:
        """Return the responses whose first turns were sampled; those of one request take each turn together."""
        conversations = [
            Conversation(sequence, self.make_environment(), result)
            for sequence, result in zip(request.sequences, results, strict=True)
        ]
        # The environment is foreign code that may block, so it runs in threads.
        await asyncio.gather(*(self._reset(c, p) for c, p in zip(conversations, request.prompts, strict=True)))
        for turn in range(1, self.max_turns + 1):
            await asyncio.gather(*(self._observe(c, turn) for c in conversations if c.open))
            unfinished = [c for c in conversations if c.open]
            if not unfinished:
                break
            answers = await generate([_next_request(c, turn) for c in unfinished])
            for conversation, answer in zip(unfinished, answers, strict=True):
                conversation.result = join_results(conversation.result, answer)
        responses = request.responses([c.result for c in conversations])
        return [self._with_observed(response, c) for response, c in zip(responses, conversations, strict=True)]

    async def _reset(self, conversation: Conversation, prompt: Prompt) -> None:
        environment = conversation.environment
        if await call_with_timeout(lambda: environment.reset(prompt), self.timeout_seconds) is FAILED:
            conversation.end("failed")

    async def _observe(self, conversation: Conversation, turn: int) -> None:
        """Let the environment answer the newest turn."""
        if conversation.result.finish_reason != "stop":
            conversation.open = False
            return
        output_ids = conversation.result.output_ids[conversation.turn_start :]
        text = self.decode(output_ids)
        answer = await call_with_timeout(lambda: conversation.environment.step(text), self.timeout_seconds)
        if isinstance(answer, Failed):
            conversation.end("failed")
        elif answer is None:
            conversation.open = False
        elif isinstance(answer, str):
            ids = self.encode(answer, int(output_ids[-1]))
            if ids is None:
                conversation.open = False
            else:
                self._append(conversation, ids, turn)
        else:
            self._append(conversation, tuple(answer), turn)

    def _append(self, conversation: Conversation, ids: tuple[int, ...], turn: int) -> None:
        """Append the environment's tokens, or finish the response if a limit is reached."""
        result = conversation.result
        start = len(result.output_ids)
        end = start + len(ids)
        if turn == self.max_turns or end >= conversation.request.max_new_tokens:
            conversation.end("length")
            return
        conversation.result = replace(
            result,
            output_ids=np.concatenate([result.output_ids, np.array(ids, np.int32)]),
            logprobs=np.concatenate([result.logprobs, np.zeros(len(ids), np.float32)]),
            mask_ids=None if result.mask_ids is None else result.mask_ids + ((),) * len(ids),
        )
        conversation.turn_start = end
        if end > start:
            conversation.observed.append((start, end))

    def _with_observed(self, response: Response, conversation: Conversation) -> Response:
        if not conversation.observed:
            return response
        ends = [0, *(end for span in conversation.observed for end in span), len(response.output_ids)]
        texts = tuple(self.decode(response.output_ids[start:end]) for start, end in pairwise(ends))
        observed = tuple(conversation.observed)
        return replace(response, text=self.decode(response.output_ids), observed=observed, turns=texts)


def _next_request(conversation: Conversation, turn: int) -> GenerationRequest:
    """Return the request for the next turn, with a new seed."""
    request, result = conversation.request, conversation.result
    length, seed = len(result.output_ids), request.sampling_params["sampling_seed"]
    assert isinstance(seed, int), f"{request.rid}: sampling_seed is {seed!r}"
    params = {
        **request.sampling_params,
        "max_new_tokens": request.max_new_tokens - length,
        "sampling_seed": fold_seed((seed, length)),
    }
    return replace(continue_request(request, result, params), rid=f"{request.rid}~{turn}")


class Failed:
    """The environment raised, or took too long."""


FAILED = Failed()


async def call_with_timeout(call: Callable[[], Observation], timeout_seconds: float) -> Observation | Failed:
    """Return the result of a call into an environment; failures and timeouts are logged and return ``FAILED``."""
    done: Future[Observation] = Future()
    # A daemon thread, so that an environment that hangs cannot keep the run from ending.
    threading.Thread(target=_call, args=(call, done), name="environment", daemon=True).start()
    result = asyncio.wrap_future(done)
    await asyncio.wait({result}, timeout=timeout_seconds)
    if not result.done():
        result.cancel()
        log.warning("An environment took longer than %g s for a turn (reward.seconds)", timeout_seconds)
        return FAILED
    if (error := result.exception()) is not None:
        log.warning("An environment raised %s: %s", type(error).__name__, error)
        return FAILED
    return result.result()


def _call(call: Callable[[], Observation], done: "Future[Observation]") -> None:
    results: list[Observation] = []

    def deliver(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if done.set_running_or_notify_cancel():
            done.set_result(results[0]) if error is None else done.set_exception(error)
        return True  # the future has the exception

    with ExitStack() as stack:
        stack.push(deliver)
        results.append(call())
