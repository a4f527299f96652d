"""The table of docs/families.md: every model family against transformers, with every layout of the tests.

python benchmarks/family_table.py
"""

import tempfile
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from megatron_rl.convert import to_hf, to_megatron
from megatron_rl.convert.to_hf import OutputFormat
from tests.policy import families
from tests.policy.families import MIXTURES, MODELS
from tests.policy.test_families import HIDDEN, LAYOUTS, by_transformers, one_step
from tests.policy.tiny import case
from tests.ranks import run_ranks

QUIET = Console(quiet=True)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    print("| family | tensors | logits | gradient | bytes, four forms |")
    print("|---|---|---|---|---|")
    for name in MODELS:
        with tempfile.TemporaryDirectory() as place:
            folder = families.save(name, Path(place) / "hf")
            layouts = [layout for layout in LAYOUTS if "expert" not in layout or name in MIXTURES]
            pairs = [differences(folder, layout) for layout in layouts]
            logits, gradient = (max(values) for values in zip(*pairs, strict=True))
            count = len(load_file(folder / "model.safetensors"))
            same = sum(round_trip_is_exact(name, Path(place), dtype, fused) for dtype, fused in FORMS)
            print(f"| {name} | {count} | {logits:.1e} | {gradient:.1e} | {same} of {len(FORMS)} |", flush=True)


FORMS = [(dtype, fused) for dtype in (torch.float32, torch.bfloat16) for fused in (False, True)]


def differences(folder: Path, layout: str) -> tuple[float, float]:
    """Return the largest difference of a logit, and of a gradient relative to the largest gradient."""
    truth = by_transformers(folder, case())
    ranks, parallel = LAYOUTS[layout]
    ours: dict[str, torch.Tensor] = {}
    for part in run_ranks(one_step, ranks, str(folder), parallel, case(), initialize=False, timeout_seconds=280):
        if HIDDEN in part and HIDDEN in ours:
            part[HIDDEN] = torch.where(ours[HIDDEN] == 0, part[HIDDEN], ours[HIDDEN])
        ours |= part
    on_disk = load_file(folder / "model.safetensors")
    head = on_disk["lm_head.weight" if "lm_head.weight" in on_disk else "model.embed_tokens.weight"]
    logits = float((ours[HIDDEN].double() @ head.double().T - truth["logits_TV"]).abs().max())
    keys = [key for key in truth if key.startswith("gradient.")]
    largest = max(float(truth[key].abs().max()) for key in keys)
    return logits, max(float((ours[key].double() - truth[key]).abs().max()) for key in keys) / largest


def round_trip_is_exact(name: str, place: Path, dtype: torch.dtype, fused: bool) -> bool:
    """Return whether converting to megatron-core and back gives the same file, byte for byte."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        source = families.save(name, Path(folder) / "hf", dtype, fused=fused)
        to_megatron.convert(source, Path(folder) / "m", 1, QUIET)
        to_hf.convert(Path(folder) / "m", Path(folder) / "again", OutputFormat(), 1, QUIET)
        files = (source / "model.safetensors", Path(folder) / "again" / "model.safetensors")
        return files[0].read_bytes() == files[1].read_bytes()


if __name__ == "__main__":
    main()
