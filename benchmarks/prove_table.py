"""Write docs/prove.md from the files that `megatron-rl prove --output` wrote.

megatron-rl prove configs/demo.toml --shrink layers=4,hidden=48 --objective all --output p32.json
megatron-rl prove configs/demo.toml --shrink layers=4,hidden=48 --objective all --output p64.json model.dtype=float64
python benchmarks/prove_table.py p32.json p64.json [NOTES.md]

The float64 run also needs ``parallel.distributed_optimizer=false optimizer.clip_grad=0``. The text of NOTES.md stands
between the counts and the table.
"""

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

COLUMNS = (("logprobs", "loss", "gradient"), ("logprobs", "gradient"))
"""Differences that the page shows of the first and of the second file."""
PAGE = Path(__file__).resolve().parents[1] / "docs" / "prove.md"
HEAD = """# Proof of layouts

This page shows that every layout gives the loss and gradient of one rank, by `megatron-rl prove`.

One training step of a Qwen3-MoE (4 layers, hidden 48, 8 experts, random weights) under each layout, compared with one
rank in float64: the largest difference over all objectives. Log-probs in nats (relative above 1), loss relative to
max(|loss|, 1), gradient: the worst parameter's norm of the difference over its norm. Entropies, ratios and Megatron's
gradient norm are checked too. {date}, 2 CPU cores, gloo.
"""


def summary(proven: dict[str, Any]) -> str:
    """Return the number of results of a file that pass, and their tolerance."""
    results = proven["results"]
    objectives = ", ".join(sorted({result["objective"] for result in results}))
    tolerance = ", ".join(f"{name} {bound:.0e}" for name, bound in proven["tolerance"].items())
    passed = sum(result["holds"] for result in results)
    return f"* {proven['dtype']}: {passed} of {len(results)} pass ({objectives}); tolerance: {tolerance}."


def table(files: list[dict[str, Any]]) -> list[str]:
    """Return the largest difference per layout over the objectives of each file; a layout that fails is marked."""
    titles = [f"{proven['dtype']}: {key}" for proven, keys in zip(files, COLUMNS, strict=False) for key in keys]
    lines = ["| layout | ranks | " + " | ".join(titles) + " |", "|---" * (len(titles) + 2) + "|"]
    for layout in dict.fromkeys(result["layout"] for result in files[0]["results"]):
        of_layout = [[result for result in proven["results"] if result["layout"] == layout] for proven in files]
        worst = [
            f"{max(result[key] for result in results):.1e}"
            for results, keys in zip(of_layout, COLUMNS, strict=False)
            for key in keys
        ]
        failed = "" if all(result["holds"] for results in of_layout for result in results) else " **FAIL**"
        lines.append(f"| `{layout}`{failed} | {of_layout[0][0]['ranks']} | " + " | ".join(worst) + " |")
    return lines


def main() -> None:
    """Write the page."""
    files = [json.loads(Path(name).read_text()) for name in sys.argv[1:3]]
    notes = [Path(name).read_text(encoding="utf-8") for name in sys.argv[3:4]]
    lines = [HEAD.format(date=date.today()), *map(summary, files), "", *notes, *table(files)]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
