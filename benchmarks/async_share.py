"""The share of time that trainer and fleet are busy, by rollout.max_lag, when a few responses are very long.

    python benchmarks/async_share.py                  # simulation: servers and trainer sleep; real fleet and HTTP
    python benchmarks/async_share.py --run RUN ...    # the same shares of finished runs, from their metrics.jsonl

The simulation measures the schedule alone, independent of the load of the machine: two servers answer a group when its
longest response is done (lengths are lognormal, drawn from each response's seed), and a training step is a sleep.
Everything between them is real: stream, buffer, fleet, client, pauses and weight pushes.
"""

import argparse
import asyncio
import json
import math
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from aiohttp import web

from benchmarks.common import table
from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.data.prompts import Generated
from megatron_rl.data.types import Prompt, Response
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.rollout.stream import Stream
from megatron_rl.tasks.base import Verdict
from megatron_rl.weights.tensor import TensorTransport
from tests.fleet.fake import FakeServer, serving

TOKEN_SECONDS = 0.0005
MEDIAN_TOKENS, SPREAD, MOST_TOKENS = 250, 0.9, 4000
TRAIN_SECONDS = (1.0, 0.4)
"""Training time per step: longer and shorter than the fleet needs for most of a batch."""
SERVERS, PROMPTS, GROUP, STEPS = 2, 16, 4, 16


def tokens_of(seed: int) -> int:
    """Return the length of a response."""
    return min(MOST_TOKENS, int(MEDIAN_TOKENS * math.exp(SPREAD * Random(seed).gauss(0, 1))))


class SleepyServer(FakeServer):
    """Answers when the longest response of a request is done; the time per token does not depend on the batch size."""

    async def generate(self, body: dict[str, Any]) -> web.Response:
        """Sleep, then answer."""
        lengths = [tokens_of(params["sampling_seed"]) for params in body["sampling_params"]]
        await asyncio.sleep(max(lengths) * TOKEN_SECONDS)
        return await super().generate(body)

    def sample(self, rid: str, input_ids: list[int], params: dict[str, Any]) -> dict[str, Any]:
        """Return a short answer: the simulated length only sets the delay."""
        return super().sample(rid, input_ids, {**params, "max_new_tokens": 1})


class AnyAnswer:
    """A task that accepts every response."""

    def prompts(self, split: str, seed: int) -> Generated:
        """Return an endless stream of prompts."""
        return Generated(lambda position: Prompt(f"p{position}", (1, 2), "", ""))

    def verify(self, prompt: Prompt, response: Response) -> Verdict:
        """Return a reward that differs between the responses of a group."""
        return Verdict(float(response.index), True)


def simulate(max_lag: int, train_seconds: float) -> dict[str, float]:
    """Return the seconds per step and the shares of time that trainer and fleet were busy."""
    sizes = [f"train.steps={STEPS}", f"train.prompts_per_step={PROMPTS}", f"train.group_size={GROUP}"]
    lag = [f"rollout.max_lag={max_lag}", "rollout.sampling.max_new_tokens=1"]
    run = load(Run, [], ["model.path=none", *sizes, *lag]).run
    with serving(*(SleepyServer() for _ in range(SERVERS))) as servers:
        urls = [server.url for server in servers]
        with Fleet.open(
            urls, TensorTransport(1 << 20), sequences_per_request=GROUP, sequences_per_server=64 * GROUP
        ) as fleet:
            stream = Stream(run, fleet, AnyAnswer())
            begun, busy = time.monotonic(), 0.0
            for step in range(STEPS):
                stream.take(step)
                before = time.monotonic()
                time.sleep(train_seconds)
                fleet.update([("t", torch.zeros(1))], step + 1)
                busy += time.monotonic() - before
                if max_lag:
                    stream.request_groups(step + 1)
            total = time.monotonic() - begun
            return {"seconds": total / STEPS, "trainer": busy / total, "fleet": fleet.busy_seconds / total}


def finished(folder: Path, first: int = 2) -> dict[str, float]:
    """Return the same numbers for a finished run, without its first steps, evaluations and last line."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["seconds"] for line in lines if line["step"] >= first and "loss" in line]
    total = sum(step["total"] - step.get("evaluate", 0.0) for step in steps)
    trainer = sum(step[phase] for step in steps for phase in ("score", "train", "weights"))
    return {
        "seconds": total / len(steps),
        "trainer": trainer / total,
        "fleet": sum(step.get("fleet", 0.0) for step in steps) / total,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="*", default=[])
    folders = parser.parse_args().run
    if folders:
        print_shares("run", {str(folder): finished(folder) for folder in folders})
    for seconds in () if folders else TRAIN_SECONDS:
        print_shares(f"max_lag, training {seconds:g} s", {f"{lag}": simulate(lag, seconds) for lag in range(3)})


def print_shares(head: str, results: dict[str, dict[str, float]]) -> None:
    """Print a table of the results; the third column is the time per step relative to the first row."""
    base = next(iter(results.values()))["seconds"]
    rows = [
        [name, f"{r['seconds']:.2f}", f"{r['seconds'] / base:.2f}", f"{r['trainer']:.0%}", f"{r['fleet']:.0%}"]
        for name, r in results.items()
    ]
    print(table([head, "seconds per step", "relative to the first row", "trainer busy", "fleet busy"], rows))


if __name__ == "__main__":
    main()
