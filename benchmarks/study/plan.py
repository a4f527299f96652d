"""The order of the study: the most important conditions first, and in each all objectives, seed by seed."""

from collections.abc import Iterable, Iterator, Sequence

from benchmarks.study.cells import (
    ABLATIONS,
    HOT,
    PAPERS,
    REAL_BUDGET,
    SAFE,
    SEEDS,
    WINDOWS,
    Cell,
    Condition,
    interleaved,
)
from benchmarks.study.measures import REAL_SUITES

REFERENCE = Condition(4, SAFE)
"""What ablations and window sweeps are run under."""

ON_POLICY = Condition(1, SAFE)
"""One update a rollout batch: every ratio is 1."""

OTHERS = (Condition(4, SAFE, lag=2), Condition(8, SAFE), Condition(4, HOT), Condition(1, HOT), Condition(8, HOT))

DIFFER_ON_POLICY = ("grpo", "dapo", "espo")
"""On-policy the gradient of GSPO, SAPO and SSPO is that of GRPO: one seed of them shows it, more would repeat it."""

ROUGH = Condition(16, HOT)
"""Where most objectives come apart: what other windows are tried under first."""

FIRST = 3
"""Seeds of the rest of the grid, of ablations and of windows that come before the others."""

REAL = ("grpo", "gspo", "sapo", "sspo", "espo")
REAL_SEEDS, REAL_LR = 2, 1e-5


def real_cells() -> list[Cell]:
    """Return the cells of the real models, which need a folder each: ``run --suite smollm2 --model FOLDER``."""
    return [
        Cell(suite, variant, PAPERS[variant], Condition(4, REAL_LR), seed, "real.toml", REAL_BUDGET)
        for suite in REAL_SUITES
        for seed in range(REAL_SEEDS)
        for variant in REAL
    ]


def plan() -> list[Cell]:
    """Return all cells of the demo's model in order."""
    on_policy = [
        cell for cell in interleaved("grid", PAPERS, [ON_POLICY]) if cell.variant in DIFFER_ON_POLICY or cell.seed == 0
    ]
    changes = (
        [*interleaved("ablations", ABLATIONS, [REFERENCE])],
        on_policy,
        [*interleaved("windows-hot", WINDOWS, [ROUGH])],
    )
    others = tuple([*interleaved("grid", PAPERS, [condition])] for condition in OTHERS)
    return [
        *interleaved("grid", PAPERS, [REFERENCE]),
        *interleaved("grid", PAPERS, [Condition(16, SAFE)]),
        *interleaved("grid", PAPERS, [ROUGH]),
        *_passes(changes, range(FIRST)),
        *_passes(others[:3], range(FIRST)),
        *_passes(changes, range(FIRST, SEEDS)),
        *interleaved("windows", WINDOWS, [REFERENCE]),
        *(cell for suite in others for cell in suite),
    ]


def _passes(suites: Iterable[Sequence[Cell]], seeds: Iterable[int]) -> Iterator[Cell]:
    """Yield the cells of these seeds, one seed of all suites after the other."""
    for seed in seeds:
        for suite in suites:
            yield from (cell for cell in suite if cell.seed == seed)


PLAN = [*{cell.key: cell for cell in plan()}.values()]
