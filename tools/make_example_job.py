"""Write launch/plain.sbatch, an example of the script that ``megatron-rl slurm`` renders."""

import contextlib
import io
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_rl.config.schema import load_run  # noqa: E402
from megatron_rl.launch.slurm.render import render  # noqa: E402

FILE = ROOT / "launch" / "plain.sbatch"
WORDS = ("configs/models/qwen3-30b-a3b-2nodes.toml", "log.path=/shared/runs/qwen3-30b-a3b")
FOLDER = Path("/shared/megatron-rl")


def script() -> str:
    """Return the script of a run with two trainer nodes and one fleet node of 8 GPUs each."""
    with contextlib.chdir(ROOT), contextlib.redirect_stderr(io.StringIO()):  # stderr lists the missing inputs
        return render(load_run(WORDS), WORDS, FOLDER, starts_here=False)


if __name__ == "__main__":
    FILE.write_text(script(), encoding="utf-8")
