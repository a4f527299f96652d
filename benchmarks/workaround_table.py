"""The table of workarounds of docs/compatibility.md: megatron-core without each workaround, and this package.

python benchmarks/workaround_table.py [NAME ...]
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from tests.policy.workarounds import DEFECTS, measured, save


def main() -> None:
    """Measure and print the column of the installed release."""
    torch.set_num_threads(1)
    print(f"| defect | megatron-core {version('megatron-core')} | with the workaround |\n|---|---|---|")
    for name in sys.argv[1:] or DEFECTS:
        defect = DEFECTS[name]
        with tempfile.TemporaryDirectory() as place:
            folder = save(defect.family, Path(place)) if defect.family else Path()
            results = [measured(defect, folder, disabled=True)]
            if defect.family:
                results.append(measured(defect, folder, disabled=False))
        cells = [cell if isinstance(cell, str) else f"{cell:.1e}" for cell in results]
        print(f"| `{name}`: {defect.description} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
