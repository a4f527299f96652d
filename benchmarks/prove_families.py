"""The table of docs/megatron.md: `megatron-rl prove` with its default set of layouts for every model family.

python benchmarks/prove_families.py [FAMILY ...]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.policy import families

DEMO = Path(__file__).resolve().parents[1] / "configs" / "demo.toml"
PRECISIONS = {
    "float32": (),
    "float64": ("model.dtype=float64", "parallel.distributed_optimizer=false", "optimizer.clip_grad=0"),
}


def main() -> None:
    """Prove each family in each precision and print its row."""
    print("| family | dtype | layouts passed | log-prob | loss | gradient |\n|---|---|---|---|---|---|")
    for family in sys.argv[1:] or families.MODELS:
        with tempfile.TemporaryDirectory() as place:
            model = families.save(family, Path(place) / "hf")
            for dtype, settings in PRECISIONS.items():
                output = Path(place) / f"{dtype}.json"
                words = [str(DEMO), f"model.path={model}", *settings, "--output", str(output)]
                subprocess.run(
                    [sys.executable, "-m", "megatron_rl", "prove", *words], stdout=sys.stderr
                )  # 1: a failure
                print(row(family, dtype, output), flush=True)


def row(family: str, dtype: str, output: Path) -> str:
    """Return the largest differences over all layouts of one result file."""
    results = json.loads(output.read_text(encoding="utf-8"))["results"]
    worst = [f"{max(result[key] for result in results):.1e}" for key in ("logprobs", "loss", "gradient")]
    passed = sum(result["holds"] for result in results)
    return f"| {family} | {dtype} | {passed} of {len(results)} | " + " | ".join(worst) + " |"


if __name__ == "__main__":
    main()
