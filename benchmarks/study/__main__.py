"""``python -m benchmarks.study``: go on with the queue, or make docs/study.md from what is there.

python -m benchmarks.study run [--until 17:20] [--suite grid]   # goes on where it was stopped
python -m benchmarks.study run --suite smollm2 --model FOLDER   # a real model, made by tools/fetch_smollm2.py
python -m benchmarks.study plan                                 # what is done, what is left
python -m benchmarks.study write                                # tables, plots and answers
"""

import argparse
import os
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

from benchmarks.study.plan import PLAN, real_cells
from benchmarks.study.queue import RESULTS, pending, read_results, real_run, run_queue

MODEL = Path(__file__).parents[2] / "configs" / "demo-model"


def main() -> None:
    """Do what the words ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "plan", "write"))
    parser.add_argument("--until", metavar="HH:MM", help="begin no run after this time of today")
    parser.add_argument("--suite", help="only the cells of this suite")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=MODEL, help="for the suites smollm2 and smollm2-moe: its folder")
    options = parser.parse_args()
    cells = [cell for cell in PLAN if options.suite in (None, cell.suite)]
    if not cells:
        cells = [cell for cell in real_cells() if cell.suite == options.suite]
    if options.what == "run":
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}  # reasoning-gym's questions follow the latter
        run_queue(cells, real_run(options.model.resolve()), options.results, _time(options.until))
    elif options.what == "plan":
        left = Counter((cell.suite, cell.condition.words) for cell in pending(cells, read_results(options.results)))
        total = Counter((cell.suite, cell.condition.words) for cell in cells)
        for (suite, words), count in total.items():
            print(f"{suite:<12} {' '.join(words):<70} {count - left[suite, words]:3} of {count}")
    else:
        from benchmarks.study.write import write

        write(read_results(options.results))


def _time(text: str | None) -> float | None:
    if text is None:
        return None
    at = datetime.strptime(text, "%H:%M").time()
    return time.mktime(datetime.combine(datetime.now().date(), at).timetuple())


if __name__ == "__main__":
    main()
