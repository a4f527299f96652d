"""The page: one HTML file with everything in it. What a run says is text to be escaped, never markup."""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from megatron_rl.report.groups import RunGroup, differences, words
from megatron_rl.report.panels import CURVES, FEWEST_SEGMENTS, MISMATCH, TIMES, clip_plots, metric_plots, phase_plot
from megatron_rl.report.plot import short
from megatron_rl.report.runs import Line, RunFolder
from megatron_rl.report.samples import RecordedSamples

WORST_SHOWN = 8
"""Tokens of ``mismatch.json`` that are listed for each run."""

LONGEST_CELL = 160


@dataclass(frozen=True)
class RunReport:
    """What is reported on: groups of runs, and what was recorded of their tokens, group by group, run by run."""

    groups: Sequence[RunGroup]
    samples: Sequence[Sequence[RecordedSamples]]

    @property
    def runs(self) -> list[tuple[RunGroup, RunFolder, RecordedSamples]]:
        """Every run with its group and its samples."""
        pairs = zip(self.groups, self.samples, strict=True)
        return [(group, run, own) for group, all_own in pairs for run, own in zip(group.runs, all_own, strict=True)]

    def plots(self) -> dict[str, Mapping[str, str]]:
        """Return for each section the SVG of its plots, by file name."""
        clips = [[own.clips for own in of_group] for of_group in self.samples]
        phases = phase_plot(self.groups)
        times = dict(metric_plots(self.groups, TIMES))
        return {
            "curves": dict(metric_plots(self.groups, CURVES)),
            "clips": dict(clip_plots(self.groups, clips)),
            "mismatch": dict(metric_plots(self.groups, MISMATCH)),
            "times": times | ({"phases": phases} if phases else {}),
        }

    def html(self) -> str:
        """Return the page."""
        plots = self.plots()
        several = any(len(group.runs) > 1 for group in self.groups)
        band = " Lines are means over seeds, bands reach from the lowest to the highest seed." if several else ""
        body = [
            "<h1>megatron-rl report</h1>",
            '<nav><a href="#runs">Runs</a><a href="#differences">Settings</a><a href="#curves">Curves</a>'
            '<a href="#tokens-section">Tokens and segments</a><a href="#clips">Clips</a>'
            '<a href="#mismatch">Mismatch</a><a href="#times">Times</a></nav>',
            _section("runs", "Runs", self._runs()),
            _section("differences", "What the runs differ by", self._differences()),
            _section("curves", "Curves", _plots(plots["curves"], f"One group of runs a colour.{band}")),
            _section("tokens-section", "Tokens and segments", self._viewer()),
            _section("clips", "Which segments are clipped", _plots(plots["clips"], CLIPS_WORDS)),
            _section("mismatch", "Rollout and trainer", [*_plots(plots["mismatch"], MISMATCH_WORDS), *self._worst()]),
            _section("times", "Where the time goes", _plots(plots["times"], TIMES_WORDS)),
        ]
        return _page("".join(body), _for_script(self._data()))

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
                f"<p>All {runs} runs have the same settings but for their seed.</p>" if runs > 1 else "<p>One run.</p>"
            )
            return
        rows = differences([group.runs for group in self.groups])
        yield '<p class="quiet">Settings that are not the same in all groups; those of log and the seed aside.</p>'
        cells = [[key, *(_cut(words(value)) for value in values)] for key, values in rows.items()]
        yield _table(["setting", *(group.label for group in self.groups)], cells)

    def _viewer(self) -> Iterable[str]:
        if not any(own.lines for _, _, own in self.runs):
            yield "<p>None of these runs wrote tokens: set <code>log.tokens</code> above 0 before a run starts.</p>"
            return
        for _, run, own in self.runs:
            if len(own.lines) < own.recorded:
                shown = f"{len(own.lines)} of {own.recorded} recorded steps are shown, evenly spread"
                yield f'<p class="quiet">{escape(run.name)}: {shown}.</p>'
        yield _file("viewer.html")

    def _worst(self) -> Iterable[str]:
        known = [(run.name, run.mismatch) for _, run, _ in self.runs if run.mismatch]
        if not known:
            return
        rows = [[name, str(found.get("step")), str(found.get("verdict", ""))] for name, found in known]
        yield _table(("run", "newest step", "what the gap comes from"), rows)
        yield "<details><summary>Tokens on which rollout and trainer agree least</summary>"
        heads = ("sample", "position", "after", "token", "rollout log-prob", "trainer log-prob", "gap, nats")
        for name, found in known:
            tokens = [token for token in found.get("worst_tokens") or [] if isinstance(token, Mapping)]
            yield f"<h3>{escape(name)}</h3>" + _table(heads, [_worst_row(token) for token in tokens[:WORST_SHOWN]])
        yield "</details>"

    def _data(self) -> dict[str, object]:
        shown = [(group, run, own) for group, run, own in self.runs if own.lines]
        return {
            "runs": [
                {
                    "label": run.name if len(self.groups) == 1 else f"{group.label}: {run.name}",
                    # A capped weight of cispo keeps its gradient.
                    "clipped": "capped" if run.objective == "cispo" else "clipped",
                    "steps": [{"step": line["step"], "samples": line["samples"]} for line in own.lines],
                }
                for group, run, own in shown
            ]
        }


CLIPS_WORDS = (
    "All segments of all updates, not only those of the responses above. The first update of a step never clips: its"
    " ratios are 1. Bars are of all seeds together, lines reach from the lowest to the highest seed. Bins with fewer"
    f" than {FEWEST_SEGMENTS} segments of a group are left out."
)
MISMATCH_WORDS = "What the rollout engine said about a sampled token, against the trainer with the same weights."
TIMES_WORDS = "The phases leave out the first step of each run, in which servers start, if there are others."


def _run_row(group: RunGroup, run: RunFolder) -> list[str]:
    trained = run.trained
    seconds = sum(float(line.get("seconds", {}).get("total", 0.0)) for line in run.lines)
    ends = []
    for key in ("accuracy", "reward_mean"):
        values = list(run.values(key).values())
        ends.append(f"{values[0]:.3f} / {values[-1]:.3f}" if values else "-")
    asked = run.settings.get("train.steps")
    steps = str(len(trained)) if asked in (None, len(trained)) else f"{len(trained)} of {asked}"
    seed = words(run.settings.get("train.seed", "-"))
    return [group.label, run.name, run.objective, seed, steps, *ends, f"{seconds / 60:.1f} min"]


def _worst_row(token: Mapping[str, object]) -> list[str]:
    engine, trainer = token.get("rollout_logprob"), token.get("trainer_logprob")
    numbers = [short(v) if isinstance(v, int | float) else "not finite" for v in (engine, trainer)]
    both = isinstance(engine, int | float) and isinstance(trainer, int | float)
    apart = short(abs(trainer - engine)) if both else "-"
    texts = [_cut(str(token.get(key, ""))) for key in ("sample", "position", "before", "text")]
    return [*texts, *numbers, apart]


def _plots(plots: Mapping[str, str], lead: str) -> Iterable[str]:
    if not plots:
        yield "<p>Nothing of this was recorded.</p>"
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


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]}..."


def _for_script(data: Line) -> str:
    """Return JSON that no text in it can turn into markup."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _page(body: str, data: str) -> str:
    """Return the document; the browser is told to run this script alone and to fetch nothing."""
    style, script = _file("page.css"), _file("viewer.js")
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width"><title>megatron-rl report</title>'
        f"<style>{style}</style></head><body>{body}"
        f'<script type="application/json" id="data">{data}</script><script>{script}</script></body></html>\n'
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _file(name: str) -> str:
    return (files("megatron_rl.report") / name).read_text(encoding="utf-8")
