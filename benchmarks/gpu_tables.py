"""The JSON files of benchmarks/gpu.sh as tables for docs/gpu.md: python benchmarks/gpu_tables.py FOLDER"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import table

GIB = 1 << 30


def step_row(name: str, found: Mapping[str, Any]) -> list[str]:
    """Return the row for one file of gpu_step.py."""
    settings = found["settings"]
    cells = [name, settings["tokens"], settings["recompute"], settings["plain"] or "-"]
    for part in ("score", "step"):
        measured = found[part]
        share, peak = measured.get("share of limit"), measured["peak"]
        cells += [f"{measured['tokens/s']:,.0f}", "-" if share is None else f"{share:.1%}"]
        cells += ["-" if peak is None else f"{peak / GIB:.1f}"]
    return cells


def run_row(metrics: Path) -> list[str]:
    """Return the row for one training run; the first two steps do not count in the times."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    accuracies = [line["accuracy"] for line in lines if "accuracy" in line]
    columns = [f"{accuracies[at]:.3f}" for at in (0, -1)] if accuracies else ["-", "-"]
    timed = [line for line in lines if "tokens" in line][2:]
    phases = ("rollout", "score", "train", "weights")
    spent = {phase: sum(line["seconds"].get(phase, 0.0) for line in timed) for phase in phases}
    if not timed:
        return [metrics.parent.name, *columns, *["-"] * (1 + len(phases))]
    rate = sum(line["tokens"] for line in timed) / sum(spent.values())
    return [
        metrics.parent.name,
        *columns,
        f"{rate:,.0f}",
        *(f"{spent[phase] / len(timed):.2f}" for phase in phases),
    ]


def report(folder: Path) -> str:
    """Return the tables for all files of the folder."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    steps = {name: found for name, found in files.items() if name.startswith("step-")}
    parts = []
    if steps:
        measures = [f"{part} {what}" for part in ("score", "step") for what in ("tokens/s", "of limit", "peak GiB")]
        heads = ["run", "row", "recompute", "plain", *measures]
        parts.append(table(heads, [step_row(name.removeprefix("step-"), found) for name, found in steps.items()]))
    if runs := sorted(folder.glob("*/metrics.jsonl")):
        heads = ["run", "accuracy at first", "at last", "tokens/s", "rollout s", "score s", "train s", "weights s"]
        parts.append(table(heads, [run_row(metrics) for metrics in runs]))
    for name, found in files.items():
        if name not in steps:
            parts.append(f"{name}:\n\n" + table(["what", "value"], [[key, str(value)] for key, value in found.items()]))
    for name, found in steps.items():
        plan = {key: f"{value / GIB:.2f} GiB" for key, value in found["planned"].items()}
        parts.append(f"{name}, planned:\n\n" + table(list(plan), [list(plan.values())]))
        if "profile" in found:
            rows = [[event["name"], f"{event['share']:.1%}", str(event["calls"])] for event in found["profile"]]
            parts.append(f"{name}, slowest operations:\n\n" + table(["operation", "share", "calls"], rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(report(Path(sys.argv[1])))
