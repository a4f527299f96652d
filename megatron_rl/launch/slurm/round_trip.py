"""One short request to every server of a fleet, before a run relies on it: who is dead, silent, slow, or wrong.

healthy   the server answers its health check, within ``rollout.start_timeout_seconds``
generate  a few tokens from a short prompt, timed; the answer is read as strictly as in training
score     the same prompt's log-probs; a server that gives others than most has other weights
"""

import asyncio
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rl.config.schema import Run, Sampling
from megatron_rl.errors import RolloutError
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.members import Member, Timeouts, wait_until_healthy
from megatron_rl.fleet.protocol import GenerationRequest
from megatron_rl.fleet.request_plan import sampling_params
from megatron_rl.fleet.servers import registered, write_address
from megatron_rl.fleet.vllm import VllmClient

PROMPT = tuple(range(1, 9))
"""Tokens that every vocabulary has."""

NEW_TOKENS = 4

LARGEST_GAP_NATS = 0.5
"""Mean absolute difference of a server's log-probs from the median of all. Kernels differ by a hundredth of it."""


@dataclass(frozen=True)
class ServerProbe:
    """What a server said.

    Attributes:
        url: its name.
        problem: why it is not fit; empty if it is.
        version: of its weights.
        seconds: that the request for a few tokens took.
        logprobs: of the prompt's tokens but the first.
    """

    url: str
    problem: str = ""
    version: str = ""
    seconds: float = 0.0
    logprobs: tuple[float, ...] = ()


def ask_fleet(run: Run, fit: Path | None = None) -> int:
    """Ask every server of a run, print a table, name the unfit ones; return 0 if there is none, else 1.

    Args:
        run: the configuration.
        fit: registry that gets the addresses of this job's servers if all are fit; None: nobody waits for them.

    Raises:
        RolloutError: servers that this job starts have not registered in time.
    """
    rollout = run.rollout
    started_here = bool(rollout.registry)
    urls: Sequence[str] = rollout.urls
    if started_here:
        urls = registered(Path(rollout.registry), rollout.servers, rollout.start_timeout_seconds)
    client = VllmClient if rollout.engine == "vllm" else Client
    timeouts = Timeouts(start_timeout_seconds=rollout.start_timeout_seconds)
    answers = asyncio.run(_ask_all([client(url) for url in urls], timeouts))
    if not run.train.resume or started_here:  # else the trainer is about to give all of them its own weights
        answers = compared(answers)
    Console(highlight=False, width=160).print(_table(answers))
    for answer in answers:
        if answer.problem:
            sys.stdout.write(f"preflight: {answer.url} {answer.problem}\n")
    if any(answer.problem for answer in answers):
        return 1
    if fit is not None and started_here:
        fit.mkdir(parents=True, exist_ok=True)
        for number, url in enumerate(urls):
            write_address(fit, number, url)
    return 0


async def _ask_all(clients: Sequence[Client], timeouts: Timeouts) -> list[ServerProbe]:
    return await asyncio.gather(*(_ask(client, timeouts) for client in clients))


async def _ask(client: Client, timeouts: Timeouts) -> ServerProbe:
    params = {**sampling_params(Sampling(max_new_tokens=NEW_TOKENS)), "sampling_seed": 0}
    try:
        await wait_until_healthy(Member(client), timeouts)
        version = await client.version()
        start = time.perf_counter()
        await client.generate([GenerationRequest("preflight/generate", PROMPT, params)])
        seconds = time.perf_counter() - start
        [scored] = await client.generate(
            [GenerationRequest("preflight/score", PROMPT, {**params, "max_new_tokens": 0})]
        )
    except RolloutError as error:
        return ServerProbe(client.url, problem=f"is not fit: {error}")
    finally:
        await client.close()
    return ServerProbe(client.url, "", version, seconds, scored.input_logprobs)


def compared(answers: Sequence[ServerProbe]) -> list[ServerProbe]:
    """Return the answers, with a problem for each that is unlike most: other weights, or another version of them."""
    fit = [answer for answer in answers if not answer.problem]
    if not fit:
        return list(answers)
    usual = Counter(answer.version for answer in fit).most_common(1)[0][0]
    median = [statistics.median(values) for values in zip(*(answer.logprobs for answer in fit), strict=True)]
    found = []
    for answer in answers:
        problem = answer.problem
        if not problem:
            gap = statistics.fmean(abs(x - y) for x, y in zip(answer.logprobs, median, strict=True))
            if gap > LARGEST_GAP_NATS:
                problem = f"has another model or other weights: its log-probs are {gap:.2f} nats from the others'"
            elif answer.version != usual:
                problem = f"has weights of version {answer.version!r}, the others have {usual!r}"
        found.append(ServerProbe(answer.url, problem, answer.version, answer.seconds, answer.logprobs))
    return found


def _table(answers: Sequence[ServerProbe]) -> Table:
    table = Table("server", "verdict", "weights", f"{NEW_TOKENS} tokens", title="Fleet", title_justify="left")
    for answer in answers:
        seconds = f"{answer.seconds * 1e3:.0f} ms" if answer.seconds else "-"
        table.add_row(answer.url, "odd" if answer.problem else "ok", answer.version or "-", seconds)
    return table
