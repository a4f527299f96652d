"""The line of benchmarks/gpu_tables.py for a run of the trainer."""

import json
from pathlib import Path

from benchmarks.gpu_tables import report


def lines_of(steps: int, accuracy: float | None) -> str:
    """Return metrics of steps of 900 tokens in 1 + 1 + 2 + 0.5 seconds; the first two take ten times as long."""
    lines: list[dict[str, object]] = []
    for step in range(steps):
        slow = 10 if step < 2 else 1
        seconds = {
            "evaluate": 7.0,
            "rollout": 1.0 * slow,
            "score": 1.0 * slow,
            "train": 2.0 * slow,
            "weights": 0.5 * slow,
        }
        lines.append({"step": step, "tokens": 900, "seconds": seconds})
    if accuracy is not None:
        lines[0]["accuracy"] = 0.25
        lines.append({"step": steps, "accuracy": accuracy, "seconds": {"evaluate": 7.0}})
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_a_run_is_a_line_without_its_first_two_steps(tmp_path: Path) -> None:
    for name, steps, accuracy in (("demo", 6, 0.75), ("short", 2, None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(lines_of(steps, accuracy))

    found = report(tmp_path).splitlines()

    assert found[2] == "| demo | 0.250 | 0.750 | 200 | 1.00 | 1.00 | 2.00 | 0.50 |"
    assert found[3] == "| short | - | - | - | - | - | - | - |"
