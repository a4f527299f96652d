"""Collects what benchmarks/gpu.sh wrote to OUT in one file, OUT/result.json.

    python benchmarks/gpu_result.py OUT

The file has hardware and versions, every step with its stage, exit code, seconds and command, in the order of the runs,
and the figures of each part under the name of its file.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from megatron_rl.launch.versions import found_versions


def result(folder: Path) -> dict[str, object]:
    """Return the contents of the folder's files."""
    lines = (folder / "steps.tsv").read_text(encoding="utf-8").splitlines() if (folder / "steps.tsv").exists() else []
    steps = []
    for line in lines:
        stage, name, code, seconds, command = line.split("\t", 4)
        steps.append({"stage": stage, "step": name, "exit": int(code), "seconds": int(seconds), "command": command})
    files = sorted(path for path in folder.glob("*.json") if path.name != "result.json")
    figures = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": found_versions(),
        "steps": steps,
        "figures": figures,
    }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / "result.json").write_text(json.dumps(result(out), indent=1) + "\n", encoding="utf-8")
