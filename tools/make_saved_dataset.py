"""Write ``tests/tasks/saved_dataset``, or check that this version of ``datasets`` writes the same files.

    python tools/make_saved_dataset.py [FOLDER] [--check]

Needs ``datasets``, which megatron-rl does not depend on: the committed files let tests read them without it. datasets
5.2.0, which ``tools/peer-env`` installs, reproduces them byte for byte.
"""

import argparse
import filecmp
import tempfile
from pathlib import Path

from datasets import Dataset, DatasetDict

COMMITTED = Path(__file__).parents[1] / "tests" / "tasks" / "saved_dataset"
SPLITS = {"train": ([5, 1, 2, 3, 4], "a1"), "test": ([0], "b2")}
"""Numbers of the rows in order, and a fixed fingerprint, because ``datasets`` would choose a random one."""


def row(number: int) -> dict[str, object]:
    """Return a row with the fields that a task reads, one of them a struct, and one that it ignores."""
    return {
        "question": f"What is {number} + 1?",
        "solution": {"value": number + 1},
        "task": "sums",
        "difficulty": number % 2,
        "noise": [1.5, 2.5],
    }


def write(folder: Path) -> None:
    """Write both splits."""
    splits = DatasetDict()
    for name, (numbers, fingerprint) in SPLITS.items():
        splits[name] = Dataset.from_list([row(number) for number in numbers])
        splits[name]._fingerprint = fingerprint
    splits.save_to_disk(folder)


def changes(folder: Path, other: Path) -> list[str]:
    """Return the files that differ between the folders."""
    names = sorted({str(path.relative_to(at)) for at in (folder, other) for path in at.rglob("*") if path.is_file()})
    same, _, _ = filecmp.cmpfiles(folder, other, names, shallow=False)
    return [name for name in names if name not in same]


def main() -> int:
    """Write, or compare; return 1 if files differ."""
    parser = argparse.ArgumentParser(description="Write tests/tasks/saved_dataset.")
    parser.add_argument("folder", nargs="?", type=Path, default=COMMITTED)
    parser.add_argument("--check", action="store_true", help="compare FOLDER with what would be written")
    words = parser.parse_args()
    if not words.check:
        write(words.folder)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "new")
        changed = changes(Path(scratch) / "new", words.folder)
    print("\n".join(f"different: {name}" for name in changed) or f"same: {words.folder}")
    return 1 if changed else 0


if __name__ == "__main__":
    raise SystemExit(main())
