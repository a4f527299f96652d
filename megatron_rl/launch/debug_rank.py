"""One rank of ``megatron-rl debug-nonfinite``: ``python -m megatron_rl.launch.debug_rank FILE FOLDER``."""

import sys
from pathlib import Path

from megatron_rl.launch.failures import reporting_failure
from megatron_rl.launch.quiet import quiet_upstream
from megatron_rl.util.exit_codes import run_command


def main() -> int:
    """Run the micro-batch in FILE with the run in FOLDER; return the exit code."""
    file, folder = map(Path, sys.argv[1:])
    quiet_upstream()
    with reporting_failure():
        from megatron_rl.train.nonfinite_dump import debug_rank

        return debug_rank(file, folder)


if __name__ == "__main__":
    sys.exit(run_command("megatron-rl debug-nonfinite", main))
