"""Prompt order and order of completion: time per step, and bias toward short responses.

    python benchmarks/completion_order.py

A simulation with the real buffers and a clock of its own: every group in progress is generated at the same speed, its
time is that of its longest response (lognormal), and a training step takes as long as a response of median length.
Tokens have the version of the moment at which they are generated, so the bound on staleness is the real one.
"""

import heapq
from collections.abc import Callable
from itertools import count

import numpy as np

from benchmarks.common import table
from megatron_rl.data.types import Group, Prompt, Response
from megatron_rl.rollout.buffer import Buffer, BufferConfig, FinishedGroup, SampleOrder
from megatron_rl.rollout.completion import CompletionBuffer
from megatron_rl.tasks.base import Verdict

STEPS, PROMPTS, GROUP = 200, 32, 8
MEDIAN, SPREAD = 1.0, 0.8


def simulate(make: Callable[[BufferConfig], Buffer | CompletionBuffer], max_lag: int) -> tuple[float, float, float]:
    """Return the time per step, the mean length of trained groups relative to all, and dropped groups per step."""
    random, numbers = np.random.default_rng(0), count()
    buffer = make(BufferConfig(PROMPTS, STEPS, max_lag))
    now, dropped, version = 0.0, 0, 0
    trained: list[float] = []
    drawn: list[float] = []
    running: list[tuple[float, int, float, int, SampleOrder, int]] = []

    def finish_next() -> float:
        end, _, length, begun, order, index = heapq.heappop(running)
        response = Response("r", "p", 0, np.ones(1), np.array([length]), "", "stop", ((begun, 0, 1),))
        group = FinishedGroup(Group(Prompt("p", (), "", ""), (response,)), (Verdict(1.0, True),))
        buffer.put(order, index, [group])
        return end

    for step in range(STEPS):
        while True:
            for order in buffer.orders(version):
                for index in order.missing:
                    length = float(random.lognormal(np.log(MEDIAN), SPREAD, GROUP).max())
                    drawn.append(length)
                    heapq.heappush(running, (now + length, next(numbers), length, version, order, index))
            if (batch := buffer.take(step)) is not None:
                break
            now = finish_next()
        trained += [float(entry.group.responses[0].logprobs[0]) for entry in batch.used]
        dropped += len(batch.dropped)
        now, version = now + MEDIAN, step + 1
        while running and running[0][0] <= now:
            finish_next()
    return now / STEPS, float(np.mean(trained) / np.mean(drawn)), dropped / STEPS


def main() -> None:
    """Print the table."""
    rows = []
    for max_lag in (1, 2, 4):
        for name, make in (("prompt", Buffer), ("completion", CompletionBuffer)):
            seconds, length, dropped = simulate(make, max_lag)
            rows.append([str(max_lag), name, f"{seconds:.2f}", f"{length:.3f}", f"{dropped:.2f}"])
    print(table(["max_lag", "order", "time per step", "length of trained groups", "too old per step"], rows))


if __name__ == "__main__":
    main()
