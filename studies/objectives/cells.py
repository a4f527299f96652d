"""The runs of the study: objectives and their variants, the conditions, and the settings of each run.

A cell is one training run. Its key lists its settings; a cell whose key is in the results is not run again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

SEEDS = 5
SAFE, HOT = 3e-4, 1e-3
"""Learning rates."""

BUDGET = (
    "train.steps=12",
    "train.prompts_per_step=32",
    "train.group_size=8",
    "rollout.sampling.max_new_tokens=40",
    "evaluate.every=12",
    "evaluate.prompts=512",
)
"""Settings that all runs of the demo's model share: 3072 responses, about 55,000 response tokens."""

REAL_BUDGET = ("train.steps=1", "train.prompts_per_step=4", "train.group_size=8")
"""The same for a real model: one rollout batch of 32 responses, as much as a CPU can do."""

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
"""Windows and temperatures of the papers. SSPO's are ours: the paper's are not public to us."""


def _changed(objective: str, **settings: object) -> tuple[str, ...]:
    """Return an objective's settings with some of them replaced or added."""
    new = {f"objective.{name}": f"objective.{name}={value}" for name, value in settings.items()}
    unchanged = [word for word in PAPERS[objective] if word.partition("=")[0] not in new]
    return (*unchanged, *new.values())


ABLATIONS: dict[str, tuple[str, ...]] = {
    "espo, one group": _changed("espo", top_fraction=1.0),
    # 0.001 is about the mean width of the moving window on the demo (entropy 0.15 nats at the start, 18 symbols).
    "espo, fixed window": _changed("espo", fixed_window=0.001),
    "espo, share 0.1": _changed("espo", top_fraction=0.1),
    "espo, share 0.4": _changed("espo", top_fraction=0.4),
    "espo, alpha 0.01": _changed("espo", alpha=0.01),
    "espo, alpha 0.05": _changed("espo", alpha=0.05),
    "espo, alpha 0.1": _changed("espo", alpha=0.1),
    # The demo's text has no full stops, so sentences are whole responses; a sum such as 7+5=2; has six tokens.
    "sspo, two sums": _changed("sspo", min_tokens=12),
    "sspo, response": _changed("sspo", granularity="sentence"),
    "sspo, fixed window": _changed("sspo", entropy_scale="none"),
}
"""Variants with a part of the objective removed or changed."""

WINDOWS: dict[str, tuple[str, ...]] = {
    "gspo, x10": _changed("gspo", clip_low=3e-3, clip_high=4e-3),
    "gspo, x100": _changed("gspo", clip_low=0.03, clip_high=0.04),
    "espo, alpha 0.5": _changed("espo", alpha=0.5),
    "sspo, 0.003": _changed("sspo", clip_low=0.003, clip_high=0.003),
    "sapo, 5 and 5.25": _changed("sapo", tau_positive=5.0, tau_negative=5.25),
    "sapo, 1 and 5": _changed("sapo", tau_negative=5.0),
    "grpo, 0.05": _changed("grpo", clip_low=0.05, clip_high=0.05),
}
"""Variants with other windows and temperatures than the papers'."""


SECOND: dict[str, tuple[str, ...]] = {
    # The grid is older than megatron-core 0.19, so its two baselines are run again beside the second set.
    "grpo, again": (*PAPERS["grpo"], "correction.kind=none"),
    "dapo, again": (*PAPERS["dapo"], "correction.kind=none"),
    "dis": ("objective.name=dis", "objective.clip_low=0.2", "objective.clip_high=0.28"),
    "cispo, engine": ("objective.name=cispo", "objective.anchor=rollout", "objective.clip_high=4"),
    "aspo": ("objective.name=aspo",),
    "vespo": ("objective.name=vespo",),
    "bapo": ("objective.name=bapo",),
    "minpro": ("objective.name=minpro", "objective.clip_low=0.2", "objective.clip_high=0.28"),
    "grpo, icepop": (*PAPERS["grpo"], "correction.kind=icepop", "correction.low=0.5", "correction.high=5"),
}
"""The second set at its defaults, GRPO with IcePop's weight (the ratio inside of the band, else 0), and baselines."""


@dataclass(frozen=True, order=True)
class Condition:
    """Settings under which the objectives are compared.

    Attributes:
        updates: optimizer steps per rollout batch.
        lr: learning rate.
        lag: ``rollout.max_lag``.
    """

    updates: int
    lr: float
    lag: int = 0

    @property
    def words(self) -> tuple[str, ...]:
        """The settings as words of the command line."""
        words = (f"train.updates_per_step={self.updates}", f"optimizer.lr={self.lr:g}")
        return (*words, f"rollout.max_lag={self.lag}") if self.lag else words

    def __str__(self) -> str:
        """Return the condition as tables show it."""
        return f"{self.updates} x {self.lr:g}" + (f", lag {self.lag}" if self.lag else "")


REFERENCE, ROUGH, LAGGING = Condition(4, SAFE), Condition(16, HOT), Condition(4, SAFE, lag=2)
ON_POLICY = Condition(1, SAFE)
GRID = (
    *(Condition(updates, SAFE) for updates in (1, 4, 8, 16)),
    *(Condition(updates, HOT) for updates in (1, 4, 8, 16)),
    LAGGING,
)
"""Every condition under which all objectives are compared."""

DIFFER_ON_POLICY = ("grpo", "dapo", "espo")
"""With one update per batch GSPO, SAPO and SSPO have GRPO's gradient: one seed shows it, more would repeat it."""

REAL_MODELS = ("smollm2", "smollm2-moe")


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        suite: name of the file of results, without ``.jsonl``.
        variant: name of the objective and its changes.
        settings: words of the command line that select the variant.
        condition: the condition.
        seed: ``train.seed``.
        config: file with the settings that all cells of the suite share.
        budget: words that say how much is sampled and trained.
    """

    suite: str
    variant: str
    settings: tuple[str, ...]
    condition: Condition
    seed: int
    config: str = "demo.toml"
    budget: tuple[str, ...] = BUDGET

    @property
    def words(self) -> tuple[str, ...]:
        """All settings of the command line."""
        return (*self.budget, *self.settings, *self.condition.words, f"train.seed={self.seed}")

    @property
    def key(self) -> str:
        """Identifier of the cell, unique in the plan."""
        suite = (self.suite,) if self.suite in REAL_MODELS else ()
        return " ".join((*suite, *self.words))


class RunResult(TypedDict, total=False):
    """The result of a cell: one line of ``results/SUITE.jsonl``.

    ``accuracy`` maps a step to the share of 512 held-out prompts that are solved. ``curves`` has one number per rollout
    batch, under the keys of ``metrics.jsonl``. A run that diverged has an ``error`` and neither of the two.
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


def _cells(suite: str, variants: dict[str, tuple[str, ...]], conditions: Sequence[Condition]) -> Iterator[Cell]:
    for condition in conditions:
        for seed in range(SEEDS):
            for variant, settings in variants.items():
                if condition != ON_POLICY or variant in DIFFER_ON_POLICY or seed == 0:
                    yield Cell(suite, variant, settings, condition, seed)


def _second() -> Iterator[Cell]:
    """Yield the cells of the second set, seed by seed, so that an unfinished suite has whole seeds."""
    for seed in range(SEEDS):
        for condition in (LAGGING, REFERENCE):
            for variant, settings in SECOND.items():
                yield Cell("second", variant, settings, condition, seed)


PLAN = [
    *_cells("grid", PAPERS, GRID),
    *_cells("ablations", ABLATIONS, [REFERENCE]),
    *_cells("windows", WINDOWS, [REFERENCE]),
    *_cells("windows-hot", WINDOWS, [ROUGH]),
    *_second(),
]
"""Every cell of the demo's model."""

REAL_PLAN = [
    Cell(suite, variant, PAPERS[variant], Condition(4, 1e-5), seed, "smollm2.toml", REAL_BUDGET)
    for suite in REAL_MODELS
    for seed in range(2)
    for variant in ("grpo", "gspo", "sapo", "sspo", "espo")
]
"""Every cell of the real models."""
