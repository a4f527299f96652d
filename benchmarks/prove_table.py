"""Writes docs/prove.md from the files that `megatron-rl prove --output` wrote.

megatron-rl prove configs/demo.toml --shrink layers=4,hidden=48 --objective all --output prove32.json
python benchmarks/prove_table.py prove32.json [prove64.json]
"""

import json
import sys
from datetime import date
from pathlib import Path

KEYS = ("logprobs", "entropies", "loss", "gradient", "norm", "ratio")
DOCS = Path(__file__).resolve().parents[1] / "docs" / "prove.md"


def section(path: Path) -> list[str]:
    """Return one file's table: for each layout the largest difference over its objectives."""
    proven = json.loads(path.read_text())
    results = proven["results"]
    objectives = sorted({result["objective"] for result in results})
    tolerance = ", ".join(f"{name} {bound:.0e}" for name, bound in proven["tolerance"].items())
    held = sum(result["holds"] for result in results)
    lines = [
        f"## {proven['dtype']}",
        "",
        f"{held} of {len(results)} hold; objectives: {', '.join(objectives)}. Tolerance: {tolerance}.",
        "",
        "| layout | ranks | " + " | ".join(KEYS) + " | holds |",
        "|---" * (len(KEYS) + 3) + "|",
    ]
    for layout in dict.fromkeys(result["layout"] for result in results):
        of_layout = [result for result in results if result["layout"] == layout]
        worst = [f"{max(result[key] for result in of_layout):.1e}" for key in KEYS]
        holds = "yes" if all(result["holds"] for result in of_layout) else "NO"
        lines.append(f"| `{layout}` | {of_layout[0]['ranks']} | " + " | ".join(worst) + f" | {holds} |")
    return [*lines, ""]


def main() -> None:
    """Write the page."""
    head = [
        "# What `megatron-rl prove` shows",
        "",
        "One training step of a Qwen3-MoE (4 layers, hidden 48, 8 experts, random weights) under each layout,",
        "compared with one rank in float64: the largest difference over all objectives. Log-probs and entropies in",
        "nats (relative above 1), loss relative to max(|loss|, 1), gradient: the worst parameter's norm of the",
        "difference over its norm, norm: megatron's gradient norm, ratio: mean and largest ratio.",
        f"{date.today()}, 2 CPU cores, gloo.",
        "",
    ]
    lines = [line for name in sys.argv[1:] for line in section(Path(name))]
    DOCS.write_text("\n".join([*head, *lines]), encoding="utf-8")


if __name__ == "__main__":
    main()
