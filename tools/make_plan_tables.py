"""Write the tables of docs/plan.md from configs/ and docs/plan-measured.json.

Usage: python tools/make_plan_tables.py [--check]. With --check nothing is written; the exit code is 1 if the page is
out of date.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.memory_plan import Measured, comparison  # noqa: E402
from megatron_rl.config.load import load  # noqa: E402
from megatron_rl.config.schema import Run  # noqa: E402
from megatron_rl.launch.planning.estimate import RunEstimate, estimate_run  # noqa: E402
from megatron_rl.launch.planning.layout import LAST  # noqa: E402
from megatron_rl.launch.planning.memory import GIB, fullest  # noqa: E402
from megatron_rl.launch.planning.parameters import active_parameters, total_parameters  # noqa: E402
from megatron_rl.launch.planning.step_cost import pipeline_bubble  # noqa: E402

PAGE = ROOT / "docs" / "plan.md"
MEASURED = ROOT / "docs" / "plan-measured.json"
CONFIGS = ROOT / "configs"
AXES = ("tensor", "pipeline", "context", "expert")


def shipped() -> list[tuple[str, Run, RunEstimate]]:
    """Return (name, run, estimate) of every shipped config, on 80 GB GPUs."""
    found = []
    for path in sorted((CONFIGS / "models").glob("*.toml"), key=lambda path: path.name):
        loaded = load(Run, [path, CONFIGS / "cluster" / "h100-80gb.toml"])
        estimate = estimate_run(loaded)
        assert estimate is not None, path
        found.append((path.stem, loaded.run, estimate))
    return sorted(found, key=lambda one: (total_parameters(one[2].family), one[2].layout.ranks))


def memory() -> str:
    """Return the layout of each shipped config and the memory per rank of its fullest stage."""
    head = (
        "config",
        "parameters, active",
        "GPUs",
        "layout",
        "weights",
        "gradients",
        "optimizer",
        "saved",
        "working",
        "peak",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, run, estimate in shipped():
        memory, layout = fullest(estimate.memories), estimate.layout
        axes = [f"{axis} {getattr(layout, axis)}" for axis in AXES if getattr(layout, axis) > 1]
        axes += [f"last stage {run.model.megatron[LAST]} layers"] if LAST in run.model.megatron else []
        counts = f"{total_parameters(estimate.family) / 1e9:.1f} G, {active_parameters(estimate.family) / 1e9:.1f} G"
        activations = memory.activations
        amounts = (memory.parameters, memory.gradients, memory.optimizer, activations.saved, activations.working)
        cells = [f"{amount / GIB:.1f}" for amount in (*amounts, memory.total)]
        words = ", ".join([*axes, f"recompute {run.model.recompute}"])
        lines.append(f"| {name} | {counts} | {layout.ranks} | {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def work() -> str:
    """Return the cost per step of each shipped config."""
    head = ("config", "tokens per step", "operations", "log-probs and training", "tokens/s", "bubble", "weights")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, run, estimate in shipped():
        cost, idle = estimate.cost, pipeline_bubble(estimate.layout, estimate.microbatches)
        assert run.cluster.gpu_tflops is not None
        rate = estimate.layout.ranks * run.cluster.gpu_tflops * 1e12 * run.cluster.mfu
        seconds = (cost.logprob_flops + cost.train_flops) / rate / (1 - idle)
        operations = f"{(cost.logprob_flops + cost.train_flops) / 1e15:,.0f}"
        times = f"{seconds:,.0f} s | {cost.tokens / seconds:,.0f} | {idle:.1%}"
        lines.append(f"| {name} | {cost.tokens:,} | {operations} | {times} | {cost.weight_bytes / GIB:,.0f} GiB |")
    return "\n".join(lines)


def measured() -> str:
    """Return planned and measured memory of each case."""
    figures = json.loads(MEASURED.read_text(encoding="utf-8"))
    return comparison({name: [(Measured(**a), Measured(**b)) for a, b in pairs] for name, pairs in figures.items()})


TABLES: dict[str, Callable[[], str]] = {"memory": memory, "work": work, "measured": measured}


def page(text: str) -> str:
    """Return the page with regenerated tables."""
    for name, made in TABLES.items():
        marks = f"<!-- {name}: made by tools/make_plan_tables.py -->", "<!-- end -->"
        pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
        text, count = pattern.subn(lambda _, made=made, marks=marks: f"{marks[0]}\n{made()}\n{marks[1]}", text)
        assert count == 1, name
    return text


def main() -> int:
    """Write or check the page; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    text = PAGE.read_text(encoding="utf-8")
    made = page(text)
    if parser.parse_args().check:
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
