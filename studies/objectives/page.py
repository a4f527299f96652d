"""Fills the tables of docs/study.md and draws its pictures from the results."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_rl.report.plot import Series, curves
from studies.objectives.cells import (
    ABLATIONS,
    DIFFER_ON_POLICY,
    GRID,
    HOT,
    LAGGING,
    ON_POLICY,
    PAPERS,
    REFERENCE,
    ROUGH,
    SAFE,
    SECOND,
    WINDOWS,
    Condition,
    RunResult,
)
from studies.objectives.measures import (
    Grouped,
    Interval,
    Seeds,
    by_seed,
    collapsed,
    grouped,
    mean_of,
    paired,
    smooth,
    trained_tokens,
)

DOCS = Path(__file__).parents[2] / "docs"
OFF_POLICY = tuple(condition for condition in GRID if condition.updates > 1)
PICTURES: dict[str, tuple[str, str, Condition]] = {
    "accuracy": ("reward_mean", "accuracy in training, mean of 3 batches", REFERENCE),
    "gradient": ("gradient_fraction", "trained tokens with a gradient", REFERENCE),
    "accuracy-hot": ("reward_mean", "accuracy in training, mean of 3 batches", ROUGH),
    "entropy-hot": ("entropy_mean", "entropy, nats per token", ROUGH),
}
"""Name of the file -> curve of the results, label of the vertical axis, condition."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def _difference(minuend: Seeds | None, subtrahend: Seeds | None, name: str) -> str:
    """Return a paired difference of a measure, in bold if its interval excludes 0."""
    if not minuend or not subtrahend:
        return "-"
    gap = paired(by_seed(minuend, name), by_seed(subtrahend, name))
    return f"**{gap.text('+.3f')}**" if gap.excludes_zero else gap.text("+.3f")


def _means(found: Grouped, name: str, conditions: Sequence[Condition]) -> list[str]:
    def cell(condition: Condition, objective: str) -> str:
        return mean_of([*by_seed(found[condition].get(objective, {}), name).values()]).text()

    shown = [condition for condition in conditions if condition in found]
    return table(
        ["updates x rate", *PAPERS],
        [[str(condition), *(cell(condition, objective) for objective in PAPERS)] for condition in shown],
    )


def final(found: Grouped) -> list[str]:
    """Accuracy after the last batch."""
    return _means(found, "final", GRID)


def speed(found: Grouped) -> list[str]:
    """Mean accuracy during training, minus GRPO's."""
    others = [objective for objective in PAPERS if objective != "grpo"]
    return table(
        ["updates x rate", *others],
        [
            [str(c), *(_difference(found[c].get(name), found[c].get("grpo"), "training") for name in others)]
            for c in GRID
            if c in found
        ],
    )


def tokens(found: Grouped) -> list[str]:
    """Share of the tokens that keep a gradient."""
    return _means(found, "tokens", OFF_POLICY)


def collapse(found: Grouped) -> list[str]:
    """Runs that end below their start, and below half of it."""
    shown = [condition for condition in (*(c for c in OFF_POLICY if c.lr == HOT), LAGGING) if condition in found]
    return table(
        ["updates x rate", *PAPERS],
        [[str(condition), *(_collapsed(found[condition].get(name, {})) for name in PAPERS)] for condition in shown],
    )


def _collapsed(seeds: Seeds) -> str:
    return "{}, {}".format(*(sum(collapsed(line, share) for line in seeds.values()) for share in (1.0, 0.5)))


def reuse(found: Grouped) -> list[str]:
    """Accuracy of the same objective with more updates per batch, or with a lag, minus with fewer or without."""
    pairs = [
        *((Condition(more, lr), Condition(less, lr)) for lr in (SAFE, HOT) for more, less in ((4, 1), (16, 4))),
        (LAGGING, REFERENCE),
    ]
    titles = [f"{a.updates} - {b.updates}, {a.lr:g}" for a, b in pairs[:-1]] + ["lag 2 - 0"]
    rows = []
    for objective in PAPERS:
        cells = []
        for more, less in pairs:
            # With one update, GSPO, SAPO and SSPO are GRPO; one seed of them was run at the safe rate.
            single = less == ON_POLICY and objective not in DIFFER_ON_POLICY
            minuend, subtrahend = found.get(more, {}), found.get(less, {})
            cells.append(_difference(minuend.get(objective), subtrahend.get("grpo" if single else objective), "final"))
        rows.append([objective, *cells])
    return table(["objective", *titles], rows)


MEASURES = {"final": "accuracy", "training": "in training", "tokens": "tokens kept", "gradient": "gradient kept"}


def variants(found: Grouped) -> list[str]:
    """Each variant minus its objective at the safe rate."""
    cells = found.get(REFERENCE, {})
    rows = [
        [variant, *(_difference(cells[variant], cells.get(variant.partition(",")[0]), name) for name in MEASURES)]
        for variant in (*ABLATIONS, *WINDOWS)
        if variant in cells
    ]
    return table(["variant", *MEASURES.values()], rows)


def second(found: Grouped) -> list[str]:
    """The second set and its baselines; without a lag also minus DAPO's runs, which have the same prompts."""
    plain, lagging = (found.get(condition, {}) for condition in (REFERENCE, LAGGING))
    rows = []
    for variant in ("grpo", "dapo", *SECOND):
        seeds = lagging.get(variant, {})
        lag = mean_of(
            [math.fsum(line["curves"]["lag_mean"]) / len(line["curves"]["lag_mean"]) for line in seeds.values()]
        )
        cells = [mean_of([*by_seed(plain.get(variant, {}), "final").values()]).text()]
        cells.append(_difference(plain.get(variant), plain.get("dapo"), "training"))
        cells += [mean_of([*by_seed(seeds, name).values()]).text() for name in ("final", "training", "tokens")]
        rows.append([variant, *cells, _collapsed(seeds), f"{lag.mean:.2f}", str(lag.count)])
    heads = [
        "accuracy",
        "in training - DAPO",
        "lag: accuracy",
        "in training",
        "tokens kept",
        "collapsed",
        "mean lag",
        "seeds",
    ]
    return table(["objective", *heads], rows)


TABLES: Mapping[str, Callable[[Grouped], list[str]]] = {
    "accuracy": final,
    "in training": speed,
    "tokens kept": tokens,
    "collapse": collapse,
    "reuse": reuse,
    "variants": variants,
    "second set": second,
}
"""Name in the page -> table."""


def fill(page: str, lines: Sequence[RunResult]) -> str:
    """Return the page with new text between each ``<!-- table: NAME -->`` and the next ``<!-- end -->``.

    Raises:
        ValueError: the page names a table that does not exist, or a table has no end.
    """
    found = grouped(lines)
    parts = page.split("<!-- table: ")
    filled = [parts[0]]
    for part in parts[1:]:
        name, _, rest = part.partition(" -->")
        _, end, after = rest.partition("<!-- end -->")
        if not end or name not in TABLES:
            raise ValueError(f'no table "{name}", or no end of it; tables: {", ".join(TABLES)}')
        text = "\n".join(TABLES[name](found))
        filled.append(f"{name} -->\n\n{text}\n\n{end}{after}")
    return "<!-- table: ".join(filled)


def write(lines: Sequence[RunResult], docs: Path = DOCS) -> None:
    """Fill the page's tables and draw its pictures."""
    page = docs / "study.md"
    page.write_text(fill(page.read_text(), lines))
    (docs / "study").mkdir(exist_ok=True)
    for name, text in pictures(lines).items():
        (docs / "study" / f"{name}.svg").write_text(text)


def pictures(lines: Sequence[RunResult]) -> dict[str, str]:
    """Return every picture of the page as SVG, by name."""
    found = grouped(lines)
    return {
        name: curves(
            [_curve(objective, found[condition][objective], column) for objective in PAPERS],
            title=f"{condition.updates} updates per batch, learning rate {condition.lr:g}: mean and 95 % interval",
            y=label,
            x="thousand trained tokens",
            width=720,
            height=360,
        )
        for name, (column, label, condition) in PICTURES.items()
    }


def _curve(label: str, seeds: Seeds, column: str) -> Series:
    lines = [line for _, line in sorted(seeds.items()) if "error" not in line]
    runs = [line["curves"][column] for line in lines]
    shown = [smooth(run) for run in runs] if column == "reward_mean" else runs
    xs = [math.fsum(values) / len(values) / 1000 for values in zip(*map(trained_tokens, lines), strict=True)]
    means: list[Interval] = [mean_of(values) for values in zip(*shown, strict=True)]
    low, high = ([m.mean + sign * m.half for m in means] for sign in (-1, 1))
    return Series(label, xs, [m.mean for m in means], low, high)
