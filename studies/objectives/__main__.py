"""Runs the study of the objectives and writes docs/study.md.

python -m studies.objectives run [--suite grid]                    # the runs without a result yet
python -m studies.objectives run --suite smollm2 --model FOLDER    # a real model, made by tools/fetch_smollm2.py
python -m studies.objectives plan                                  # finished runs of each suite and condition
python -m studies.objectives write                                 # tables and pictures from the results
"""

import argparse
import os
from collections import Counter
from pathlib import Path

from studies.objectives.cells import PLAN, REAL_PLAN
from studies.objectives.page import write
from studies.objectives.runs import FOLDER, RESULTS, pending, read_results, run_pending, train


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "plan", "write"))
    parser.add_argument("--suite", choices=sorted({cell.suite for cell in (*PLAN, *REAL_PLAN)}))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    model = FOLDER.parents[1] / "configs" / "demo-model"
    parser.add_argument("--model", type=Path, default=model, help="folder of the model (default: %(default)s)")
    options = parser.parse_args()
    cells = [cell for cell in (*PLAN, *REAL_PLAN) if cell.suite == options.suite] if options.suite else PLAN
    if options.what == "run":
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}  # reasoning-gym's questions follow the latter
        run_pending(cells, train(options.model.resolve()), options.results)
    elif options.what == "plan":
        left = Counter((cell.suite, cell.condition) for cell in pending(cells, read_results(options.results)))
        total = Counter((cell.suite, cell.condition) for cell in cells)
        for (suite, condition), count in total.items():
            print(f"{suite:<12} {condition!s:<20} {count - left[suite, condition]:3} of {count}")
    else:
        write(read_results(options.results))


if __name__ == "__main__":
    main()
