"""The cells of the study: what is run, with which settings, in which order.

A cell is one training run. Its key is the list of its settings, so that a cell whose line is in the results is not run
again, whatever else the plan holds. The order interleaves seeds: wherever the queue is stopped, every objective of a
condition has about as many seeds as the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

SEEDS = 5
SAFE, HOT = 3e-4, 1e-3

BUDGET = (
    "train.steps=12",  # rollout batches
    "train.prompts_per_step=32",
    "train.group_size=8",
    "rollout.sampling.max_new_tokens=40",
    "evaluate.every=12",
    "evaluate.prompts=512",
)
"""The same for every cell: 3072 responses, about 55,000 response tokens."""

REAL_BUDGET = (
    "train.steps=1",
    "train.prompts_per_step=4",
    "train.group_size=8",
)
"""Of a real model a CPU carries one rollout batch: 32 responses, four updates. Nothing is learnt in it."""

PAPERS: dict[str, tuple[str, ...]] = {
    "grpo": ("objective.name=grpo", "objective.clip_low=0.2", "objective.clip_high=0.2"),
    "dapo": (
        "objective.name=grpo",
        "objective.clip_low=0.2",
        "objective.clip_high=0.28",
        "objective.aggregation=token",
    ),
    "gspo": ("objective.name=gspo", "objective.clip_low=3e-4", "objective.clip_high=4e-4"),
    "sapo": ("objective.name=sapo", "objective.tau_positive=1.0", "objective.tau_negative=1.05"),
    "sspo": ("objective.name=sspo", "objective.clip_low=0.03", "objective.clip_high=0.03"),
    "espo": ("objective.name=espo", "objective.alpha=0.02", "objective.top_fraction=0.2"),
}
"""The papers' windows and temperatures (for SSPO, whose windows are not public to us, our reconstruction's)."""


def _changed(objective: str, **settings: object) -> tuple[str, ...]:
    """Return an objective's settings with some of them replaced or added."""
    new = {f"objective.{name}": f"objective.{name}={value}" for name, value in settings.items()}
    kept = [word for word in PAPERS[objective] if word.partition("=")[0] not in new]
    return (*kept, *new.values())


ABLATIONS: dict[str, tuple[str, ...]] = {
    "espo, one group": _changed("espo", top_fraction=1.0),
    # 0.001 is about the mean width of the moving window on the demo (entropy 0.15 nats at the start, 18 symbols).
    "espo, fixed window": _changed("espo", fixed_window=0.001),
    "espo, share 0.1": _changed("espo", top_fraction=0.1),
    "espo, share 0.4": _changed("espo", top_fraction=0.4),
    "espo, alpha 0.01": _changed("espo", alpha=0.01),
    "espo, alpha 0.05": _changed("espo", alpha=0.05),
    "espo, alpha 0.1": _changed("espo", alpha=0.1),
    # The demo's text has no full stops, so that sentences are whole responses; a sum such as 7+5=2; has six tokens.
    "sspo, two sums": _changed("sspo", min_tokens=12),
    "sspo, response": _changed("sspo", granularity="sentence"),
    "sspo, fixed window": _changed("sspo", entropy_scale="none"),
}
"""What the papers' ablations take away or change."""

WINDOWS: dict[str, tuple[str, ...]] = {
    "gspo, x10": _changed("gspo", clip_low=3e-3, clip_high=4e-3),
    "gspo, x100": _changed("gspo", clip_low=0.03, clip_high=0.04),
    "espo, alpha 0.5": _changed("espo", alpha=0.5),
    "sspo, 0.003": _changed("sspo", clip_low=0.003, clip_high=0.003),
    "sapo, 5 and 5.25": _changed("sapo", tau_positive=5.0, tau_negative=5.25),
    "sapo, 1 and 5": _changed("sapo", tau_negative=5.0),
    "grpo, 0.05": _changed("grpo", clip_low=0.05, clip_high=0.05),
}
"""A small sweep around the papers' windows and temperatures."""


@dataclass(frozen=True)
class Condition:
    """What the objectives are compared under.

    Attributes:
        updates: optimizer steps on each rollout batch.
        lr: learning rate.
        lag: weight versions that samples may be old.
    """

    updates: int
    lr: float
    lag: int = 0

    @property
    def words(self) -> tuple[str, ...]:
        """The settings."""
        words = (f"train.updates_per_step={self.updates}", f"optimizer.lr={self.lr:g}")
        return (*words, f"rollout.max_lag={self.lag}") if self.lag else words


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        suite: which file of results it belongs to.
        variant: the objective and its changes, in words.
        settings: what makes the variant.
        condition: what it is run under.
        seed: of prompts, sampling and shuffling.
        config: the file with what all cells of the suite share.
        budget: how much is sampled and trained.
    """

    suite: str
    variant: str
    settings: tuple[str, ...]
    condition: Condition
    seed: int
    config: str = "study.toml"
    budget: tuple[str, ...] = BUDGET

    @property
    def words(self) -> tuple[str, ...]:
        """Everything on top of ``config``, as on the command line."""
        return (*self.budget, *self.settings, *self.condition.words, f"train.seed={self.seed}")

    @property
    def key(self) -> str:
        """What tells the cell from every other."""
        suite = () if self.config == "study.toml" else (self.suite,)
        return " ".join((*suite, *self.words))


class Line(TypedDict, total=False):
    """The result of a cell, a line of ``results/SUITE.jsonl``.

    ``accuracy`` is by rollout batch (of 512 held-out prompts), ``curves`` have a number a batch, named as in
    ``metrics.jsonl``. A run that diverged has an ``error`` and neither of the two.
    """

    key: str
    suite: str
    variant: str
    updates: int
    lr: float
    lag: int
    seed: int
    words: list[str]
    accuracy: dict[str, float]
    curves: dict[str, list[float]]
    error: str
    cpu_seconds: float
    seconds: float
    date: str
    commit: str
    versions: dict[str, str]


def interleaved(
    suite: str, variants: dict[str, tuple[str, ...]], conditions: Sequence[Condition], seeds: int = SEEDS
) -> Iterator[Cell]:
    """Yield the cells of these variants and conditions, one seed of all of them after the other."""
    for seed in range(seeds):
        for condition in conditions:
            for variant, settings in variants.items():
                yield Cell(suite, variant, settings, condition, seed)
