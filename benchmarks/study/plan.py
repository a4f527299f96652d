"""The order of the study: the most important conditions first, and in each all objectives, seed by seed."""

from benchmarks.study.cells import ABLATIONS, HOT, PAPERS, SAFE, SEEDS, WINDOWS, Cell, Condition, interleaved

REFERENCE = Condition(4, SAFE)
"""What ablations and window sweeps are run under."""

ON_POLICY = Condition(1, SAFE)
"""One update a rollout batch: every ratio is 1."""

OTHERS = (Condition(4, HOT), Condition(4, SAFE, lag=2), Condition(8, SAFE), Condition(1, HOT), Condition(8, HOT))

DIFFER_ON_POLICY = ("grpo", "dapo", "espo")
"""On-policy the gradient of GSPO, SAPO and SSPO is that of GRPO: one seed of them shows it, more would repeat it."""

FIRST = 3
"""Seeds of ablations and window sweeps before the rest of the grid has its turn."""


def plan() -> list[Cell]:
    """Return all cells in order."""
    changes = {**ABLATIONS, **WINDOWS}
    changed = [
        Cell("ablations" if variant in ABLATIONS else "windows", variant, settings, REFERENCE, seed)
        for seed in range(SEEDS)
        for variant, settings in changes.items()
    ]
    on_policy = [
        cell for cell in interleaved("grid", PAPERS, [ON_POLICY]) if cell.variant in DIFFER_ON_POLICY or cell.seed == 0
    ]
    return [
        *interleaved("grid", PAPERS, [REFERENCE]),
        *interleaved("grid", PAPERS, [Condition(16, SAFE)]),
        *interleaved("grid", PAPERS, [Condition(16, HOT)]),
        *(cell for cell in changed if cell.seed < FIRST),
        *on_policy,
        *(cell for cell in changed if cell.seed >= FIRST),
        *(cell for condition in OTHERS for cell in interleaved("grid", PAPERS, [condition])),
    ]


PLAN = plan()
