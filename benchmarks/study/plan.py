"""The order of the study: the most important conditions first."""

from benchmarks.study.cells import ABLATIONS, HOT, PAPERS, SAFE, WINDOWS, Cell, Condition, interleaved

GRID = (
    Condition(4, SAFE),
    Condition(16, SAFE),
    Condition(4, HOT),
    Condition(16, HOT),
    Condition(1, SAFE),
    Condition(8, SAFE),
    Condition(4, SAFE, lag=2),
)
"""On-policy and increasingly off-policy, safe and hot, without and with a lag."""

REFERENCE = Condition(4, SAFE)
"""What ablations and window sweeps are run under."""


def plan() -> list[Cell]:
    """Return all cells in order."""
    cells = [cell for condition in GRID[:4] for cell in interleaved("grid", PAPERS, [condition])]
    cells += interleaved("ablations", ABLATIONS, [REFERENCE])
    cells += [cell for condition in GRID[4:] for cell in interleaved("grid", PAPERS, [condition])]
    cells += interleaved("windows", WINDOWS, [REFERENCE])
    return cells


PLAN = plan()
