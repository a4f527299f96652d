"""The tables of docs/study.md: each is a function from the finished cells to lines of Markdown."""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.study.cells import ABLATIONS, HOT, PAPERS, SAFE, WINDOWS, Cell, Condition, Line
from benchmarks.study.intervals import Interval, mean_of, paired, rate
from benchmarks.study.measures import MEASURES, REAL_SUITES, Cells, Key, collapsed, grouped, reaches
from benchmarks.study.plan import DIFFER_ON_POLICY, PLAN, REFERENCE, ROUGH

Found = Mapping[Key, Mapping[str, Cells]]

LEARNING = ("final", "at_tokens", "along")
GRADIENT = ("entropy", "clipped", "gradient", "kept", "left")


def key_of(condition: Condition) -> Key:
    """Return how the condition's results are found."""
    return condition.updates, condition.lr, condition.lag


def in_words(key: Key) -> str:
    """Return a condition in words."""
    updates, lr, lag = key
    said = f"{updates} update{'s' if updates > 1 else ''} a batch, lr {lr:g}"
    return f"{said}, lag {lag}" if lag else said


def row(cells: Sequence[str]) -> str:
    """Return a line of a table."""
    return "| " + " | ".join(cells) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table."""
    return [row(head), "|---" * len(head) + "|", *map(row, rows)]


def conditions(found: Found) -> list[str]:
    """Return, for every condition of the grid that has runs, what was learnt and what became of the gradient."""
    lines: list[str] = []
    for key in dict.fromkeys(key_of(cell.condition) for cell in PLAN):
        variants = {name: cells for name, cells in found.get(key, {}).items() if name in PAPERS}
        if not variants:
            continue
        ordered = [(name, variants[name]) for name in PAPERS if name in variants]
        lines += ["", f"### {in_words(key)[0].upper()}{in_words(key)[1:]}", ""]
        lines += table(
            ["objective", "seeds", *(MEASURES[m].title for m in (*LEARNING, "steps80")), "reached 80 %", *COLLAPSE],
            [[name, str(len(cells.lines)), *_means(cells, (*LEARNING, "steps80")),
              *_rates(cells, reaches, *COLLAPSE.values())]
             for name, cells in ordered],
        )  # fmt: skip
        lines += ["", *table(
            ["objective", *(MEASURES[m].title for m in GRADIENT)],
            [[name, *_means(cells, GRADIENT)] for name, cells in ordered],
        )]  # fmt: skip
    return lines


def _means(cells: Cells, names: Sequence[str]) -> list[str]:
    return [mean_of([*cells.by_seed(name).values()]).text(MEASURES[name].form) for name in names]


def _rates(cells: Cells, *asked: Callable[[Line], bool]) -> list[str]:
    said = []
    for holds in asked:
        hits = sum(map(holds, cells.lines.values()))
        share = rate(hits, len(cells.lines))
        said.append(f"{hits} of {share.count} [{share.low:.2f}, {share.high:.2f}]")
    return said


def collapsed_half(line: Line) -> bool:
    """Return whether a run ends below half of what it began with."""
    return collapsed(line, 0.5)


COLLAPSE = {"below its start": collapsed, "below half of it": collapsed_half}


def differences(found: Found, pairs: Sequence[tuple[str, str]], names: Sequence[str], keys: Sequence[Key]) -> list[str]:
    """Return a table of paired differences; bold where the interval does not hold 0."""
    rows = []
    for key in keys:
        for ours, theirs in pairs:
            cells = found.get(key, {})
            if ours in cells and theirs in cells:
                gaps = [paired(cells[ours].by_seed(name), cells[theirs].by_seed(name)) for name in names]
                seeds = max(gap.count for gap in gaps)
                rows.append([in_words(key), f"{ours} - {theirs}", str(seeds), *map(_told, gaps)])
    return table(["condition", "difference", "seeds", *(MEASURES[name].title for name in names)], rows)


def _told(gap: Interval) -> str:
    said = gap.text("+.3f")
    return f"**{said}**" if gap.excludes_zero else said


GRID_KEYS = tuple(dict.fromkeys(key_of(cell.condition) for cell in PLAN if cell.suite == "grid"))
OFF_POLICY = tuple(key for key in GRID_KEYS if key[0] > 1)


def gspo_gradient(found: Found) -> list[str]:
    """Does GSPO discard more gradient than SSPO and ESPO?"""
    pairs = [("gspo", "sspo"), ("gspo", "espo"), ("gspo", "grpo")]
    return differences(found, pairs, ("kept", "left", "final", "along"), OFF_POLICY)


def sapo_stability(found: Found) -> list[str]:
    """Does SAPO stay stable where hard clipping collapses?"""
    pairs = [("sapo", name) for name in PAPERS if name != "sapo"]
    keys = [key for key in OFF_POLICY if key[1] == HOT]
    rows = [
        [in_words(key), name, str(len(cells.lines)), *_means(cells, ("final", "entropy", "left")),
         *_rates(cells, *COLLAPSE.values())]
        for key in keys
        for name, cells in found.get(key, {}).items() if name in PAPERS
    ]  # fmt: skip
    titles = [MEASURES[name].title for name in ("final", "entropy", "left")]
    return [
        *table(["condition", "objective", "seeds", *titles, *COLLAPSE], rows),
        "",
        *differences(found, pairs, ("final", "along", "entropy"), keys),
    ]


def against_grpo(found: Found) -> list[str]:
    """Every objective against GRPO, everywhere."""
    pairs = [(name, "grpo") for name in PAPERS if name != "grpo"]
    return differences(found, pairs, ("final", "at_tokens", "along"), GRID_KEYS)


def off_policy(found: Found) -> list[str]:
    """The same objective, 16 updates a batch against 4 and 1, and 4 against 1."""
    rows: list[list[str]] = []
    for name in PAPERS:
        for more, less in ((4, 1), (16, 4)):
            for lr in (SAFE, HOT):
                twin = name if less > 1 or name in DIFFER_ON_POLICY else "grpo"
                ours, theirs = found.get((more, lr, 0), {}).get(name), found.get((less, lr, 0), {}).get(twin)
                rows += _gaps([name, f"{lr:g}", f"{more} - {less}"], ours, theirs)
    return table(["objective", "lr", "updates a batch", "seeds", *_GAP_TITLES], rows)


def lagging(found: Found) -> list[str]:
    """The same objective on samples that may be two versions old, against samples of the newest version."""
    updates, lr, _ = key_of(REFERENCE)
    rows: list[list[str]] = []
    for name in PAPERS:
        rows += _gaps([name], *(found.get((updates, lr, lag), {}).get(name) for lag in (2, 0)))
    return table(["objective", "seeds", *_GAP_TITLES], rows)


_GAPS = ("final", "along", "kept")
_GAP_TITLES = [MEASURES[name].title for name in _GAPS]


def _gaps(words: list[str], ours: Cells | None, theirs: Cells | None) -> list[list[str]]:
    if not ours or not theirs:
        return []
    gaps = [paired(ours.by_seed(name), theirs.by_seed(name)) for name in _GAPS]
    return [[*words, str(gaps[0].count), *map(_told, gaps)]]


def ablations(found: Found) -> list[str]:
    """What ESPO and SSPO lose without a part."""
    return _changes(found, [*ABLATIONS], [REFERENCE])


def windows(found: Found) -> list[str]:
    """Other windows and temperatures than the papers'."""
    hot = found.get(key_of(ROUGH), {})
    rows = [
        [
            name,
            str(len(hot[name].lines)),
            *_means(hot[name], ("final", "entropy", "clipped", "left")),
            *_rates(hot[name], *COLLAPSE.values()),
        ]
        for base in PAPERS
        for name in (base, *(other for other in WINDOWS if other.partition(",")[0] == base))
        if name in hot and any(other.startswith(f"{base},") and other in hot for other in WINDOWS)
    ]
    titles = [MEASURES[name].title for name in ("final", "entropy", "clipped", "left")]
    return [
        *_changes(found, [*WINDOWS], [REFERENCE, ROUGH]),
        "",
        f"{in_words(key_of(ROUGH))}, in absolute numbers:".capitalize(),
        "",
        *table(["window", "seeds", *titles, *COLLAPSE], rows),
    ]


def _changes(found: Found, variants: Sequence[str], conditions: Sequence[Condition]) -> list[str]:
    pairs = [(variant, variant.partition(",")[0]) for variant in variants]
    return differences(found, pairs, ("final", "along", "kept", "left"), [key_of(each) for each in conditions])


def reached(found: Found, plan: Sequence[Cell] = PLAN) -> list[str]:
    """Return how much of the plan has been run."""
    rows = []
    for suite, key in dict.fromkeys((cell.suite, key_of(cell.condition)) for cell in plan):
        cells = [cell for cell in plan if (cell.suite, key_of(cell.condition)) == (suite, key)]
        done = [cell for cell in cells if cell.seed in _seeds(found, key, cell.variant)]
        rows.append([suite, in_words(key), f"{len(done)} of {len(cells)}"])
    return table(["suite", "condition", "runs"], rows)


def _seeds(found: Found, key: Key, variant: str) -> set[int]:
    cells = found.get(key, {}).get(variant)
    return set(cells.lines) if cells else set()


REAL_CURVES = {
    "reward_mean": "reward",
    "entropy_mean": "entropy",
    "clipped_fraction": "clipped",
    "gradient_fraction": "gradient use",
    "gradient_kept": "gradient kept",
}


def real(lines: Sequence[Line]) -> list[str]:
    """Return what became of the gradient in the first batch of the real models."""
    rows = []
    for suite in REAL_SUITES:
        for name in PAPERS:
            curves = [line["curves"] for line in lines if (line["suite"], line["variant"]) == (suite, name)]
            if curves:
                means = [mean_of([curve[column][0] for curve in curves]).text() for column in REAL_CURVES]
                rows.append([suite, name, str(len(curves)), *means])
    return table(["model", "objective", "seeds", *REAL_CURVES.values()], rows)


def meanings(found: Found) -> list[str]:
    """Return what the columns mean."""
    return [f"* **{measure.title}**: {measure.meaning}." for measure in MEASURES.values()]


TABLES: Mapping[str, Callable[[Found], list[str]]] = {
    "meanings": meanings,
    "gspo gradient": gspo_gradient,
    "sapo stability": sapo_stability,
    "against grpo": against_grpo,
    "off policy": off_policy,
    "lag": lagging,
    "ablations": ablations,
    "windows": windows,
    "conditions": conditions,
    "reached": reached,
}
"""By the name that stands in the page."""

REAL = "real models"
"""The table that is not of the demo's model."""


def fill(page: str, lines: Sequence[Line]) -> str:
    """Return the page with the text between ``<!-- table: NAME -->`` and ``<!-- end -->`` made anew."""
    found = grouped(lines)
    parts = page.split("<!-- table: ")
    filled = [parts[0]]
    for part in parts[1:]:
        name, _, rest = part.partition(" -->")
        _, end, after = rest.partition("<!-- end -->")
        if not end or name not in (*TABLES, REAL):
            raise ValueError(f'no table "{name}", or no end of it; there are: {", ".join((*TABLES, REAL))}')
        text = "\n".join(real(lines) if name == REAL else TABLES[name](found)).strip("\n")
        filled.append(f"{name} -->\n\n{text}\n\n{end}{after}")
    return "<!-- table: ".join(filled)
