"""How much of the time trainer and fleet each have work, by rollout.max_lag, with a few very long responses.

    python benchmarks/async_share.py                  # clockwork: servers and a trainer that sleep, real fleet and HTTP
    python benchmarks/async_share.py --run RUN ...    # the same shares of finished runs, from their metrics.jsonl

Clockwork shows the schedule alone, whatever else the machine does: two servers answer a group when its longest response
is done (lengths are lognormal, drawn from each response's seed), a step of training is a sleep. Everything between them
is the product: stream, buffer, fleet, client, pauses and pushes.
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
"""Of a step: longer, and shorter, than the fleet takes for most of a batch."""
SERVERS, PROMPTS, GROUP, STEPS = 2, 16, 4, 16


def tokens_of(seed: int) -> int:
    """Return the length of a response."""
    return min(MOST_TOKENS, int(MEDIAN_TOKENS * math.exp(SPREAD * Random(seed).gauss(0, 1))))


class SleepyServer(FakeServer):
    """Answers when the longest response of a request is done; a token takes as long whatever the company."""

    async def generate(self, body: dict[str, Any]) -> web.Response:
        """Sleep, then answer."""
        lengths = [tokens_of(params["sampling_seed"]) for params in body["sampling_params"]]
        await asyncio.sleep(max(lengths) * TOKEN_SECONDS)
        return await super().generate(body)

    def sample(self, rid: str, input_ids: list[int], params: dict[str, Any]) -> dict[str, Any]:
        """Return a short answer: the length is in the time."""
        return super().sample(rid, input_ids, {**params, "max_new_tokens": 1})


class AnyAnswer:
    """A task with a verdict for everything."""

    def prompts(self, split: str, seed: int) -> Generated:
        """Return prompts without end."""
        return Generated(lambda position: Prompt(f"p{position}", (1, 2), "", ""))

    def verify(self, prompt: Prompt, response: Response) -> Verdict:
        """Return a reward that differs within the group."""
        return Verdict(float(response.index), True)


def clockwork(max_lag: int, train_seconds: float) -> dict[str, float]:
    """Return seconds a step, and the share of them that trainer and fleet had work."""
    sizes = [f"train.steps={STEPS}", f"train.prompts_per_step={PROMPTS}", f"train.group_size={GROUP}"]
    lag = [f"rollout.max_lag={max_lag}", "rollout.sampling.max_new_tokens=1"]
    run = load(Run, [], ["model.path=none", *sizes, *lag]).run
    with serving(*(SleepyServer() for _ in range(SERVERS))) as servers:
        urls = [server.url for server in servers]
        with Fleet(urls, TensorTransport(1 << 20), rows_per_request=GROUP, requests_per_server=64) as fleet:
            stream = Stream(run, fleet, AnyAnswer())
            begun, busy = time.monotonic(), 0.0
            for step in range(STEPS):
                stream.take(step)
                before = time.monotonic()
                time.sleep(train_seconds)
                fleet.update([("t", torch.zeros(1))], step + 1)
                busy += time.monotonic() - before
                if max_lag:
                    stream.sample_ahead(step + 1)
            total = time.monotonic() - begun
            return {"seconds": total / STEPS, "trainer": busy / total, "fleet": fleet.busy_seconds / total}


def finished(folder: Path, first: int = 2) -> dict[str, float]:
    """Return the same of a run, without its first steps, its evaluations and its last line."""
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
        table("run", {str(folder): finished(folder) for folder in folders})
    for seconds in () if folders else TRAIN_SECONDS:
        table(f"max_lag, training {seconds:g} s", {f"{lag}": clockwork(lag, seconds) for lag in range(3)})


def table(head: str, rows: dict[str, dict[str, float]]) -> None:
    """Print rows, with their time a step against the first one's."""
    print(f"| {head} | seconds a step | of the first row | trainer has work | fleet has work |\n|---|---|---|---|---|")
    base = next(iter(rows.values()))["seconds"]
    for name, row in rows.items():
        shares = f"{row['trainer']:.0%} | {row['fleet']:.0%}"
        print(f"| {name} | {row['seconds']:.2f} | {row['seconds'] / base:.2f} | {shares} |")


if __name__ == "__main__":
    main()
