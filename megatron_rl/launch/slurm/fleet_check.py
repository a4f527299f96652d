"""Sends one short request to every server of a fleet, to find dead, silent, slow or wrong servers before a run.

health    the server answers its health check within ``rollout.start_timeout_seconds``
form      the server holds its weights in the form in which they are pushed: quantized in the same way, or not at all
generate  a few tokens from a short prompt, timed; the answer is validated as strictly as in training
log-probs of the same prompt; a server whose log-probs differ from most servers has other weights
"""

import asyncio
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from megatron_rl.config.rollout import Sampling
from megatron_rl.config.schema import Run
from megatron_rl.errors import RolloutError
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.members import Member, Timeouts, wait_until_healthy
from megatron_rl.fleet.protocol import GenerationRequest
from megatron_rl.fleet.quantization import FormJudge, require_form
from megatron_rl.fleet.registry import UNCHECKED, Registry
from megatron_rl.fleet.request_plan import sampling_params
from megatron_rl.fleet.vllm import VllmClient
from megatron_rl.launch.server_forms import form_judge
from megatron_rl.util.console import make_console

PROMPT = tuple(range(1, 9))
"""Token ids that every vocabulary has."""

NEW_TOKENS = 4

MAX_GAP_NATS = 0.5
"""Largest accepted mean absolute difference from the median log-probs, about 100 times what kernels differ by."""


@dataclass(frozen=True)
class ServerProbe:
    """The answer of one server.

    Attributes:
        url: address of the server.
        problem: why the server cannot be used; empty if it can.
        version: version of its weights.
        seconds: duration of the request for a few tokens.
        logprobs: log-probs of the prompt's tokens, without the first.
    """

    url: str
    problem: str = ""
    version: str = ""
    seconds: float = 0.0
    logprobs: tuple[float, ...] = ()


def check_fleet(run: Run) -> int:
    """Check every server of a run, print a table and the problems; return 0 if there are none, else 1.

    If all are good, the file ``unchecked`` of the registry is removed, for which the trainer waits.

    Raises:
        RolloutError: the servers of this job did not register in time.
    """
    rollout, registry = run.rollout, Path(run.rollout.registry)
    urls: Sequence[str] = rollout.urls
    if rollout.registry:
        urls = Registry(registry).wait(rollout.servers, rollout.start_timeout_seconds, checked=False)
    client = VllmClient if rollout.engine == "vllm" else Client
    timeouts = Timeouts(start_timeout_seconds=rollout.start_timeout_seconds)
    probes = asyncio.run(_probe_all([client(url) for url in urls], timeouts, form_judge(run)))
    if rollout.registry:  # the trainer pushes its weights to running servers before the first step
        probes = compare_weights(probes)
    make_console().print(_table(probes))
    for probe in probes:
        if probe.problem:
            sys.stdout.write(f"preflight: {probe.url} {probe.problem}\n")
    if any(probe.problem for probe in probes):
        return 1
    if rollout.registry:
        (registry / UNCHECKED).unlink(missing_ok=True)
    return 0


async def _probe_all(clients: Sequence[Client], timeouts: Timeouts, judge: FormJudge) -> list[ServerProbe]:
    return await asyncio.gather(*(_probe(client, timeouts, judge) for client in clients))


async def _probe(client: Client, timeouts: Timeouts, judge: FormJudge) -> ServerProbe:
    params = {**sampling_params(Sampling(max_new_tokens=NEW_TOKENS)), "sampling_seed": 0}
    try:
        await wait_until_healthy(Member(client), timeouts)
        await require_form(client, judge)
        version = await client.version()
        start = time.perf_counter()
        await client.generate([GenerationRequest("preflight/generate", PROMPT, params)])
        seconds = time.perf_counter() - start
        [scored] = await client.generate(
            [GenerationRequest("preflight/score", PROMPT, {**params, "max_new_tokens": 0})]
        )
    except RolloutError as error:
        return ServerProbe(client.url, problem=f"cannot be used: {error}")
    finally:
        await client.close()
    return ServerProbe(client.url, "", version, seconds, tuple(scored.input_logprobs.tolist()))


def compare_weights(probes: Sequence[ServerProbe]) -> list[ServerProbe]:
    """Return the probes, with a problem for each server whose weights or their version differ from most servers'."""
    good = [probe for probe in probes if not probe.problem]
    if not good:
        return list(probes)
    usual = Counter(probe.version for probe in good).most_common(1)[0][0]
    median = [statistics.median(values) for values in zip(*(probe.logprobs for probe in good), strict=True)]

    def problem_of(probe: ServerProbe) -> str:
        gap = statistics.fmean(abs(x - y) for x, y in zip(probe.logprobs, median, strict=True))
        if gap > MAX_GAP_NATS:
            return f"has another model or other weights: its log-probs differ by {gap:.2f} nats from the others'"
        if probe.version != usual:
            return f"has weights of version {probe.version!r}, the others have {usual!r}"
        return ""

    return [probe if probe.problem else replace(probe, problem=problem_of(probe)) for probe in probes]


def _table(probes: Sequence[ServerProbe]) -> Table:
    table = Table("server", "verdict", "weights", f"{NEW_TOKENS} tokens", title="Fleet", title_justify="left")
    for probe in probes:
        seconds = f"{probe.seconds * 1e3:.0f} ms" if probe.seconds else "-"
        table.add_row(probe.url, "faulty" if probe.problem else "ok", probe.version or "-", seconds)
    return table
