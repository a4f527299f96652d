"""Time and memory of checkpoint conversion: python benchmarks/convert.py [--gigabytes 2]

A random Qwen3-MoE of about that size in bfloat16 is written, copied with ``cp``, converted in both directions,
verified, and loaded and written by mbridge where that is installed, each in a separate process. Prints the time as a
ratio to that of ``cp`` and the peak memory above the level after the imports. The page cache is warm. Results:
docs/families.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.common import ROOT
from megatron_rl.models.hf_mapping import family_of

SHAPE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
LAYER_BYTES = 2 * (32 * 3 * 512 * 1024 + 2 * 1024 * 1024 + 2 * 256 * 1024)
MEASURED = """
import json, sys, time
from pathlib import Path
{imports}
def kilobytes(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])
Path("/proc/self/clear_refs").write_text("5")  # reset the peak after the imports
before, begun = kilobytes("VmRSS"), time.perf_counter()
{work}
print(json.dumps([time.perf_counter() - begun, 1024 * (kilobytes("VmHWM") - before)]))
"""
OURS = "from megatron_rl.convert.main import main"
MBRIDGE = """
import torch
from pathlib import Path
from mbridge import AutoBridge
from megatron_rl.config.schema import Run
from megatron_rl.distributed.mesh import single_rank_world
from megatron_rl.policy.engine import Policy
from tests.policy.test_mbridge import EngineNames
from transformers import AutoConfig
folder, target = sys.argv[1:]
settings = {"model": {"path": folder, "dtype": "bfloat16"}, "parallel": {"distributed_optimizer": False}}
view = EngineNames(Policy(Run.model_validate(settings), single_rank_world(), total_updates=1))
view.named_parameters = lambda *a, **k: iter(view.named.items())
config = AutoConfig.from_pretrained(folder)
config.rope_theta = 10000.0
bridge = AutoBridge.from_config(config, dtype=torch.bfloat16)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        size = write_model(folder / "hf", round(args.gigabytes * 1e9 / LAYER_BYTES))
        threads = ["--threads", str(args.threads)]
        rows = {
            "cp": lambda: copied(folder),
            "hf-to-megatron": lambda: ours(folder / "m", "hf-to-megatron", folder / "hf", folder / "m", *threads),
            "megatron-to-hf": lambda: ours(folder / "h", "megatron-to-hf", folder / "m", folder / "h", *threads),
            "verify": lambda: ours(folder / "none", "verify", folder / "hf", folder / "m", *threads),
            "mbridge load_weights": lambda: mbridge(folder, "bridge.load_weights([view], folder)"),
            "mbridge save_weights": lambda: mbridge(folder, "bridge.load_weights([view], folder)", "save"),
        }
        print(f"{size / 1e9:.2f} GB, layers of {LAYER_BYTES / 1e6:.0f} MB, {args.threads} threads")
        base = 0.0
        for name, measure in rows.items():
            try:
                results = [measure() for _ in range(args.repeats)]
            except subprocess.CalledProcessError as error:
                print(f"{name}: did not run: {error.stderr.strip().splitlines()[-1]}")
                continue
            seconds, peak = min(seconds for seconds, _ in results), min(peak for _, peak in results)
            base = base or seconds
            memory = f", peak {peak / 1e6:,.0f} MB" if name != "cp" else ""
            print(f"{name}: {size / seconds / 1e9:.2f} GB/s, {seconds / base:.1f} x the time of cp{memory}", flush=True)


def write_model(folder: Path, layers: int) -> int:
    """Write the random model, one file per layer, and return its bytes."""
    config = {**SHAPE, "num_hidden_layers": max(layers, 1)}
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in family_of(config).hf_shapes().items():
        groups.setdefault(name.split(".")[2] if ".layers." in name else "ends", {})[name] = shape
    for number, group in enumerate(groups.values()):
        tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in group.items()}
        save_file(tensors, folder / f"model-{number:05}.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.iterdir())


def copied(folder: Path) -> tuple[float, float]:
    """Return the seconds of a plain copy, flushed to disk as the converter does."""
    shutil.rmtree(folder / "copy", ignore_errors=True)
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", folder / "hf", folder / "copy"], check=True)
    subprocess.run(["sync", "-f", folder / "copy"], check=True)
    seconds = time.perf_counter() - begun
    shutil.rmtree(folder / "copy")
    return seconds, 0.0


def ours(target: Path, *command: object) -> tuple[float, float]:
    """Return seconds and peak bytes of a converter command."""
    shutil.rmtree(target, ignore_errors=True)
    return measured(OURS, "main(sys.argv[1:])", *command)


def mbridge(folder: Path, load: str, save: str = "") -> tuple[float, float]:
    """Return seconds and peak bytes of mbridge loading a model on one rank, or saving it."""
    shutil.rmtree(folder / "mbridge", ignore_errors=True)
    imports = MBRIDGE + (load if save else "")
    work = "bridge.save_weights([view], target)" if save else load
    return measured(imports, work, folder / "hf", folder / "mbridge")


def measured(imports: str, work: str, *arguments: object) -> tuple[float, float]:
    """Return the seconds and peak bytes of a program after its imports."""
    program = MEASURED.format(imports=imports, work=work)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


if __name__ == "__main__":
    main()
