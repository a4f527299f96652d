"""From the line of a cell to what the tables compare.

``reward_mean`` of a rollout batch is the sampled accuracy of the weights of that batch on 32 prompts that were never
trained on (the task has hundreds of thousands), 8 answers each: the curve of accuracy costs nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from benchmarks.study.cells import Line

SMOOTH = 3
"""Rollout batches of a moving mean: 768 answers."""
GOAL = 0.8


@dataclass(frozen=True)
class Measure:
    """What a table tells of a cell.

    Attributes:
        title: of the column.
        meaning: in a sentence.
        form: of its numbers.
    """

    title: str
    meaning: str
    form: str = ".3f"


MEASURES: dict[str, Measure] = {
    "final": Measure("accuracy at last", "of 512 held-out prompts, one sampled answer each, after the last batch"),
    "at_tokens": Measure("at equal tokens", "accuracy while training (moving mean) where the thriftiest run ended"),
    "along": Measure("mean on the way", "accuracy while training, mean over all batches: how fast it learns"),
    "steps80": Measure(
        "batches to 80 %", "first batch whose moving mean is 0.8; a run that never is counts as 12", ".1f"
    ),
    "entropy": Measure("entropy at last", "nats a token, mean of the last three batches"),
    "clipped": Measure("clipped", "share of trained tokens that the trust region took out, mean over batches"),
    "gradient": Measure("gradient use", "share of trained tokens with a gradient, mean over batches"),
    "kept": Measure("tokens kept", "the same as a share of the tokens whose advantage is not 0"),
    "left": Measure(
        "gradient kept", "sum of |d loss / d log-prob|, as a share of what it is with every ratio 1 and nothing clipped"
    ),
}


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and the two before it (fewer at the beginning)."""
    return [math.fsum(values[max(0, i + 1 - SMOOTH) : i + 1]) / len(values[max(0, i + 1 - SMOOTH) : i + 1])
            for i in range(len(values))]  # fmt: skip


def trained_tokens(line: Line) -> list[float]:
    """Return how many response tokens were trained on up to and with each batch."""
    responses = 256
    return list(accumulate(responses * mean for mean in line["curves"]["response_tokens_mean"]))


def at_tokens(line: Line, tokens: float) -> float:
    """Return the moving mean of the accuracy at a number of trained tokens, linear between batches."""
    xs, ys = trained_tokens(line), smooth(line["curves"]["reward_mean"])
    for i in range(1, len(xs)):
        if xs[i] >= tokens:
            share = (tokens - xs[i - 1]) / (xs[i] - xs[i - 1])
            return ys[i - 1] + min(max(share, 0.0), 1.0) * (ys[i] - ys[i - 1])
    return ys[-1]


def measures(line: Line, tokens: float) -> dict[str, float]:
    """Return every measure of a cell that did not diverge; ``tokens`` is where ``at_tokens`` looks."""
    curves = line["curves"]
    rewards, clipped, gradient = curves["reward_mean"], curves["clipped_fraction"], curves["gradient_fraction"]
    steps = len(rewards)
    reached = [i + 1 for i, value in enumerate(smooth(rewards)) if i + 1 >= SMOOTH and value >= GOAL]
    signal = [(g, g + c) for g, c in zip(gradient, clipped, strict=True) if g + c > 0]
    # Runs of before this was measured do not have it.
    left = {"left": math.fsum(curves["gradient_kept"]) / steps} if "gradient_kept" in curves else {}
    return left | {
        "final": line["accuracy"][str(steps)],
        "at_tokens": at_tokens(line, tokens),
        "along": math.fsum(rewards) / steps,
        "steps80": float(reached[0] if reached else steps),
        "entropy": math.fsum(curves["entropy_mean"][-SMOOTH:]) / SMOOTH,
        "clipped": math.fsum(clipped) / steps,
        "gradient": math.fsum(gradient) / steps,
        "kept": math.fsum(g for g, _ in signal) / math.fsum(s for _, s in signal),
    }


def reaches(line: Line) -> bool:
    """Return whether the moving mean of the accuracy came to 0.8."""
    return any(value >= GOAL for value in smooth(line["curves"].get("reward_mean", []))[SMOOTH - 1 :])


def collapsed(line: Line, share: float = 1.0) -> bool:
    """Return whether a run diverged or ends below this share of the accuracy at its start, on the same prompts."""
    if "error" in line:
        return True
    accuracy = line["accuracy"]
    return accuracy[max(accuracy, key=int)] < share * accuracy["0"]


@dataclass(frozen=True)
class Cells:
    """The finished cells of one variant under one condition.

    Attributes:
        lines: by seed.
        tokens: where ``at_tokens`` looks.
    """

    lines: Mapping[int, Line]
    tokens: float

    def by_seed(self, name: str) -> dict[int, float]:
        """Return one measure of every run that did not diverge."""
        sound = {seed: line for seed, line in self.lines.items() if "error" not in line}
        found = {seed: measures(line, self.tokens) for seed, line in sound.items()}
        return {seed: values[name] for seed, values in found.items() if name in values}

    def curve(self, name: str) -> list[list[float]]:
        """Return a curve of every run that did not diverge."""
        return [line["curves"][name] for _, line in sorted(self.lines.items()) if "error" not in line]


REAL_SUITES = ("smollm2", "smollm2-moe")

Key = tuple[int, float, int]
"""Updates, learning rate, lag."""


def grouped(lines: Iterable[Line]) -> dict[Key, dict[str, Cells]]:
    """Return the cells by condition and variant; ``at_tokens`` looks where a condition's thriftiest run ended.

    Only runs of the grid count for that: an ablation does not change what the grid's tables say.
    """
    found: dict[Key, dict[str, dict[int, Line]]] = {}
    for line in lines:
        if line["suite"] in REAL_SUITES:  # other models
            continue
        key = (line["updates"], line["lr"], line["lag"])
        found.setdefault(key, {}).setdefault(line["variant"], {})[line["seed"]] = line
    result: dict[Key, dict[str, Cells]] = {}
    for key, variants in found.items():
        sound = [
            line
            for seeds in variants.values()
            for line in seeds.values()
            if "error" not in line and line["suite"] == "grid"
        ]
        tokens = min((trained_tokens(line)[-1] for line in sound), default=math.nan)
        result[key] = {variant: Cells(seeds, tokens) for variant, seeds in variants.items()}
    return result
