"""Responses of several turns: what an environment says is put between what the model says, token by token.

    prompt --> turn --> environment --> turn --> ... --> environment is done: "stop"
                            |
                            +--> no room or no turn left: "length";  it raised or took too long: "failed"

A turn is asked for with all tokens before it as they are: what was sampled is never made into text and back. Tokens of
the environment have log-prob 0 and no version, and are named in ``Response.observed``.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Protocol

from megatron_rl.data.environment import Environment
from megatron_rl.data.types import Group, Prompt, Response, fold_seed
from megatron_rl.fleet.partial import joined
from megatron_rl.fleet.protocol import Sample, SampleRequest
from megatron_rl.fleet.request_plan import Chunk, groups

logger = logging.getLogger(__name__)

Ask = Callable[[Sequence[SampleRequest]], Awaitable[list[Sample]]]
Observation = str | Sequence[int] | None


class Codec(Protocol):
    """The part of a Hugging Face tokenizer that turns go through."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        ...


@dataclass
class Row:
    """One response in the making."""

    request: SampleRequest
    environment: Environment
    sample: Sample
    begun: int = 0
    """Where the turn that was sampled last begins, in output tokens."""
    observed: list[tuple[int, int]] = field(default_factory=list)
    open: bool = True

    def end(self, reason: str) -> None:
        """Sample no more."""
        self.sample, self.open = replace(self.sample, finish_reason=reason), False


@dataclass(frozen=True)
class Turns:
    """How responses of several turns are made.

    Attributes:
        make: a new environment.
        codec: from the model's tokens to the environment's text, and back for what it says.
        wrap: what is put around a text of the environment, such as the turns of a chat template.
        most: turns of the model in a response.
        seconds: an environment that takes longer for a turn has failed.
    """

    make: Callable[[], Environment]
    codec: Codec
    wrap: Callable[[str], str]
    most: int
    seconds: float

    async def finish(self, chunk: Chunk, samples: Sequence[Sample], ask: Ask) -> list[Group]:
        """Return the groups of a request whose first turns were sampled; all its rows take a turn together."""
        prompts = [prompt for prompt in chunk.prompts for _ in range(chunk.group_size)]
        rows = [Row(request, self.make(), s) for request, s in zip(chunk.requests, samples, strict=True)]
        # Steps go through the environment in threads: it is not ours, and may take its time.
        begun = await asyncio.gather(*(self._reset(row, p) for row, p in zip(rows, prompts, strict=True)))
        assert len(begun) == len(rows)
        for turn in range(1, self.most + 1):
            await asyncio.gather(*(self._observe(row, turn) for row in rows if row.open))
            talking = [row for row in rows if row.open]
            if not talking:
                break
            answers = await ask([_request(row, turn) for row in talking])
            for row, answer in zip(talking, answers, strict=True):
                _add(row, answer)
        made = groups(chunk, [row.sample for row in rows])
        whole = iter(rows)
        return [
            replace(g, responses=tuple(self._told(response, next(whole)) for response in g.responses)) for g in made
        ]

    async def _reset(self, row: Row, prompt: Prompt) -> None:
        if await guarded(lambda: row.environment.reset(prompt), self.seconds) is FAILED:
            row.end("failed")

    async def _observe(self, row: Row, turn: int) -> None:
        """Let the environment answer the newest turn."""
        if row.sample.finish_reason != "stop":
            row.open = False
            return
        said = self.codec.decode(list(row.sample.output_ids[row.begun :]), skip_special_tokens=True)
        answer = await guarded(lambda: row.environment.step(said), self.seconds)
        if isinstance(answer, Failed):
            row.end("failed")
        elif answer is None:
            row.open = False
        else:
            text = isinstance(answer, str)
            ids = self.codec.encode(self.wrap(answer), add_special_tokens=False) if text else answer
            self._put(row, tuple(ids), turn)

    def _put(self, row: Row, ids: tuple[int, ...], turn: int) -> None:
        start = len(row.sample.output_ids)
        end = start + len(ids)
        if turn == self.most or end >= row.request.max_new_tokens:
            row.end("length")
            return
        row.sample = replace(
            row.sample, output_ids=row.sample.output_ids + ids, logprobs=row.sample.logprobs + (0.0,) * len(ids)
        )
        row.begun = end
        if end > start:
            row.observed.append((start, end))

    def _told(self, response: Response, row: Row) -> Response:
        if not row.observed:
            return response
        text, last = (
            self.codec.decode(list(ids), skip_special_tokens=True)
            for ids in (response.output_ids, response.output_ids[row.begun :])
        )
        return replace(response, text=text, observed=tuple(row.observed), last_turn=last)


def _request(row: Row, turn: int) -> SampleRequest:
    """Return the request for a row's next turn, with a seed of its own."""
    made, seed = len(row.sample.output_ids), row.request.sampling_params["sampling_seed"]
    assert isinstance(seed, int), f"{row.request.rid}: sampling_seed is {seed!r}"
    params = {
        **row.request.sampling_params,
        "max_new_tokens": row.request.max_new_tokens - made,
        "sampling_seed": fold_seed((seed, made)),
    }
    ids = row.request.input_ids + row.sample.output_ids
    return replace(row.request, rid=f"{row.request.rid}~{turn}", input_ids=ids, sampling_params=params)


def _add(row: Row, answer: Sample) -> None:
    row.sample = joined(row.sample, answer)


class Failed:
    """An environment raised, or took too long."""


FAILED = Failed()


async def guarded(call: Callable[[], Observation], seconds: float) -> Observation | Failed:
    """Return what a call into an environment returns; what it raises is logged, and it is not waited for for ever."""
    done: Future[Observation] = Future()
    # Daemons: one that hangs must not keep the run from ending.
    threading.Thread(target=_call, args=(call, done), name="environment", daemon=True).start()
    waited = asyncio.wrap_future(done)
    await asyncio.wait({waited}, timeout=seconds)
    if not waited.done():
        waited.cancel()
        logger.warning("an environment took longer than %g s for a turn (reward.seconds)", seconds)
        return FAILED
    if (error := waited.exception()) is not None:
        logger.warning("an environment raised %s: %s", type(error).__name__, error)
        return FAILED
    return waited.result()


def _call(call: Callable[[], Observation], done: "Future[Observation]") -> None:
    answers: list[Observation] = []

    def settle(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if done.set_running_or_notify_cancel():
            done.set_result(answers[0]) if error is None else done.set_exception(error)
        return True  # whatever it was, the future tells it

    with ExitStack() as stack:
        stack.push(settle)
        answers.append(call())
