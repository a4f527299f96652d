"""The HTML page, a single file without external resources. All text of runs is escaped."""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from megatron_rl.report.groups import RunGroup, differences, setting_text
from megatron_rl.report.panels import (
    CURVES,
    MIN_SEGMENTS,
    MISMATCH,
    TIMES,
    clip_plots,
    metric_plots,
    objective_panels,
    phase_plot,
)
from megatron_rl.report.plot import short
from megatron_rl.report.runs import Line, RunFolder
from megatron_rl.report.samples import RecordedSamples

MAX_WORST_TOKENS = 8
"""Tokens of ``mismatch.json`` that are listed per run."""

MAX_CELL_LENGTH = 160


@dataclass(frozen=True)
class RunReport:
    """The report on groups of runs, with the recorded tokens of each run of each group."""

    groups: Sequence[RunGroup]
    samples: Sequence[Sequence[RecordedSamples]]

    @property
    def runs(self) -> list[tuple[RunGroup, RunFolder, RecordedSamples]]:
        """All runs with their groups and samples."""
        pairs = zip(self.groups, self.samples, strict=True)
        return [
            (group, run, samples)
            for group, of_group in pairs
            for run, samples in zip(group.runs, of_group, strict=True)
        ]

    def plots(self) -> dict[str, Mapping[str, str]]:
        """Return the plots of each section, as name -> SVG."""
        clips = [[samples.clips for samples in of_group] for of_group in self.samples]
        phases = phase_plot(self.groups)
        times = dict(metric_plots(self.groups, TIMES))
        return {
            "curves": dict(metric_plots(self.groups, [*CURVES, *objective_panels(self.groups)])),
            "clips": dict(clip_plots(self.groups, clips)),
            "mismatch": dict(metric_plots(self.groups, MISMATCH)),
            "times": times | ({"phases": phases} if phases else {}),
        }

    def html(self, *, is_live: bool = False) -> str:
        """Return the page; a live one fetches itself again when its server says so."""
        plots = self.plots()
        has_bands = any(len(group.runs) > 1 for group in self.groups)
        bands = " Lines are means over seeds; bands reach from the lowest to the highest seed." if has_bands else ""
        body = [
            "<h1>megatron-rl report</h1>",
            '<nav><a href="#runs">Runs</a><a href="#differences">Settings</a><a href="#curves">Curves</a>'
            '<a href="#tokens-section">Tokens and segments</a><a href="#clips">Clips</a>'
            '<a href="#mismatch">Mismatch</a><a href="#times">Times</a><span id="live" class="quiet"></span></nav>',
            _section("runs", "Runs", self._runs()),
            _section("differences", "Settings that differ", self._differences()),
            _section("curves", "Curves", _plots(plots["curves"], f"One color per group of runs.{bands}")),
            _section("tokens-section", "Tokens and segments", self._viewer()),
            _section("clips", "Clipped segments", _plots(plots["clips"], CLIPS_TEXT)),
            _section("mismatch", "Rollout and trainer", [*_plots(plots["mismatch"], MISMATCH_TEXT), *self._worst()]),
            _section("times", "Times", _plots(plots["times"], TIMES_TEXT)),
        ]
        return _page("".join(body), _for_script(self._data()), is_live=is_live)

    def _runs(self) -> Iterable[str]:
        heads = ("group", "run", "objective", "seed", "steps", "accuracy first / last", "reward first / last", "time")
        rows = [_run_row(group, run) for group, run, _ in self.runs]
        yield _table(heads, rows)
        for _, run, _ in self.runs:
            for note in run.notes:
                yield f'<p class="note"><b>{escape(run.name)}</b>: {escape(note)}</p>'

    def _differences(self) -> Iterable[str]:
        if len(self.groups) == 1:
            runs = len(self.groups[0].runs)
            yield (
                f"<p>All {runs} runs have the same settings except for the seed.</p>" if runs > 1 else "<p>One run.</p>"
            )
            return
        rows = differences([group.runs for group in self.groups])
        yield '<p class="quiet">Settings that differ between groups, except for the seed and [log].</p>'
        cells = [[key, *(_truncate(setting_text(value)) for value in values)] for key, values in rows.items()]
        yield _table(["setting", *(group.label for group in self.groups)], cells)

    def _viewer(self) -> Iterable[str]:
        if not any(samples.lines for _, _, samples in self.runs):
            yield "<p>None of these runs wrote tokens: set <code>log.tokens</code> above 0 before a run starts.</p>"
            return
        for _, run, samples in self.runs:
            if len(samples.lines) < samples.recorded:
                shown = f"{len(samples.lines)} of {samples.recorded} recorded steps are shown, evenly spaced"
                yield f'<p class="quiet">{escape(run.name)}: {shown}.</p>'
        yield _read_resource("viewer.html")

    def _worst(self) -> Iterable[str]:
        reports = [(run.name, run.mismatch) for _, run, _ in self.runs if run.mismatch]
        if not reports:
            return
        rows = [[name, str(report.get("step")), str(report.get("verdict", ""))] for name, report in reports]
        yield _table(("run", "newest step", "cause of the gap"), rows)
        yield "<details><summary>Tokens with the largest gaps</summary>"
        heads = ("sample", "position", "after", "token", "rollout log-prob", "trainer log-prob", "gap, nats")
        for name, report in reports:
            tokens = [token for token in report.get("worst_tokens") or [] if isinstance(token, Mapping)]
            yield f"<h3>{escape(name)}</h3>" + _table(heads, [_worst_row(token) for token in tokens[:MAX_WORST_TOKENS]])
        yield "</details>"

    def _data(self) -> dict[str, object]:
        shown = [(group, run, samples) for group, run, samples in self.runs if samples.lines]
        return {
            "runs": [
                {
                    "label": run.name if len(self.groups) == 1 else f"{group.label}: {run.name}",
                    "clipped": samples.clipped_word,
                    "steps": [{"step": line["step"], "samples": line["samples"]} for line in samples.lines],
                }
                for group, run, samples in shown
            ]
        }


CLIPS_TEXT = (
    "All segments of all updates, not only those of the responses above. The first update of a step never clips,"
    " because its ratios are 1. Bars are over all seeds; lines reach from the lowest to the highest seed. Bins with"
    f" fewer than {MIN_SEGMENTS} segments of a group are left out."
)
MISMATCH_TEXT = "Log-probs of sampled tokens: rollout engine compared with the trainer at the same weights."
TIMES_TEXT = "Phases do not include the first step of each run, in which servers start, unless it is the only one."


def _run_row(group: RunGroup, run: RunFolder) -> list[str]:
    trained = run.trained
    seconds = sum(float(line.get("seconds", {}).get("total", 0.0)) for line in run.lines)
    first_and_last = []
    for key in ("accuracy", "reward_mean"):
        values = list(run.values(key).values())
        first_and_last.append(f"{values[0]:.3f} / {values[-1]:.3f}" if values else "-")
    planned = run.settings.get("train.steps")
    steps = str(len(trained)) if planned in (None, len(trained)) else f"{len(trained)} of {planned}"
    seed = setting_text(run.settings.get("train.seed", "-"))
    return [group.label, run.name, run.objective, seed, steps, *first_and_last, f"{seconds / 60:.1f} min"]


def _worst_row(token: Mapping[str, object]) -> list[str]:
    engine, trainer = token.get("rollout_logprob"), token.get("trainer_logprob")
    numbers = [short(v) if isinstance(v, int | float) else "not finite" for v in (engine, trainer)]
    comparable = isinstance(engine, int | float) and isinstance(trainer, int | float)
    gap = short(abs(trainer - engine)) if comparable else "-"
    texts = [_truncate(str(token.get(key, ""))) for key in ("sample", "position", "before", "text")]
    return [*texts, *numbers, gap]


def _plots(plots: Mapping[str, str], lead: str) -> Iterable[str]:
    if not plots:
        yield "<p>Nothing was recorded.</p>"
        return
    yield f'<p class="quiet">{escape(lead)}</p>'
    figures = "".join(f'<div data-plot="{escape(name)}">{svg}</div>' for name, svg in plots.items())
    yield f'<div class="plots">{figures}</div>'


def _section(anchor: str, title: str, parts: Iterable[str]) -> str:
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _truncate(text: str) -> str:
    return text if len(text) <= MAX_CELL_LENGTH else f"{text[:MAX_CELL_LENGTH]}..."


def _for_script(data: Line) -> str:
    """Return JSON in which no text can be parsed as markup."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _page(body: str, data: str, *, is_live: bool) -> str:
    """Return the document. Its content security policy allows only its scripts and, if it is live, its server."""
    style = _read_resource("page.css")
    scripts = [_read_resource(name) for name in ("viewer.js", *(["live.js"] if is_live else []))]
    sources = " ".join(f"'{_hash(script)}'" for script in scripts)
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src {sources}; base-uri 'none'"
    policy += "; connect-src 'self'" if is_live else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width"><title>megatron-rl report</title>'
        f"<style>{style}</style></head><body>{body}"
        f'<script type="application/json" id="data">{data}</script>'
        + "".join(f"<script>{script}</script>" for script in scripts)
        + "</body></html>\n"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _read_resource(name: str) -> str:
    return (files("megatron_rl.report") / name).read_text(encoding="utf-8")
