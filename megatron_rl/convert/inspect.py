"""What a checkpoint folder holds, from its headers alone."""

from collections import Counter
from pathlib import Path

from rich.console import Console

from megatron_rl.convert.manifest import read_manifest
from megatron_rl.models.checkpoint_folders import open_checkpoint
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.hf_reader import fp8_block
from megatron_rl.models.torch_dist_reader import TorchDistReader


def describe(folder: Path, console: Console) -> None:
    """Print kind, family, sizes and dtypes of a checkpoint, and whether it fits its config.json.

    Raises:
        ConfigError: a family that is not known.
        DataError: a file cannot be read, or the tensors do not fit config.json.
    """
    hf = read_hf_config(folder)
    family = family_of(hf)
    source = open_checkpoint(folder, family)
    kind = (
        "megatron-core distributed checkpoint (torch_dist)" if isinstance(source, TorchDistReader) else "Hugging Face"
    )
    own = {name: spec for name, spec in source.specs.items() if not source.is_passthrough(name, family)}
    elements = sum(spec.num_bytes // spec.dtype.itemsize for spec in own.values())
    dtypes = Counter(str(spec.dtype).removeprefix("torch.") for spec in own.values())
    console.print(f"{folder}: {kind}")
    console.print(f"  model_type {hf['model_type']}, {family.num_layers} layers, {family.num_experts or 'no'} experts")
    console.print(f"  {len(own)} tensors, {elements:,} parameters, {', '.join(f'{n} {d}' for d, n in dtypes.items())}")
    along = len(source.specs) - len(own)
    if along:
        console.print(f"  {along} tensors that only go along")
    if block := fp8_block(hf):
        console.print(f"  FP8 in blocks of {block[0]} x {block[1]}, read as bfloat16")
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.distcp")])
    console.print(f"  {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes")
    if manifest := read_manifest(folder):
        console.print(f"  manifest of {manifest.conversion}, {len(manifest.tensors)} tensors")
    source.check(family)
    console.print("  every tensor that config.json asks for is there, and no other")
