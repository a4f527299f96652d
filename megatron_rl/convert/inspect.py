"""Summary of a checkpoint folder from its file headers."""

from collections import Counter
from pathlib import Path

from rich.console import Console

from megatron_rl.convert.manifest import read_manifest
from megatron_rl.models.checkpoint_folders import open_checkpoint
from megatron_rl.models.encodings import format_of
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.torch_dist_reader import TorchDistReader


def describe(folder: Path, console: Console) -> None:
    """Print format, family, sizes and dtypes of a checkpoint, and whether its tensors match config.json.

    Raises:
        ConfigError: the model family is unknown.
        DataError: a file cannot be read, or the tensors do not match config.json.
    """
    hf = read_hf_config(folder)
    family = family_of(hf)
    reader = open_checkpoint(folder, family)
    kind = (
        "megatron-core distributed checkpoint (torch_dist)" if isinstance(reader, TorchDistReader) else "Hugging Face"
    )
    specs = {name: spec for name, spec in reader.specs.items() if not reader.is_passthrough(name, family)}
    elements = sum(spec.num_bytes // spec.dtype.itemsize for spec in specs.values())
    dtypes = Counter(str(spec.dtype).removeprefix("torch.") for spec in specs.values())
    console.print(f"{folder}: {kind}")
    console.print(f"  model_type {hf['model_type']}, {family.num_layers} layers, {family.num_experts or 'no'} experts")
    console.print(
        f"  {len(specs)} tensors, {elements:,} parameters, {', '.join(f'{n} {d}' for d, n in dtypes.items())}"
    )
    if passthrough := len(reader.specs) - len(specs):
        console.print(f"  {passthrough} tensors that the model does not use and conversion copies")
    if quantized := format_of(hf):
        console.print(f"  {quantized.label}, read as bfloat16")
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.distcp")])
    console.print(f"  {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes")
    if manifest := read_manifest(folder):
        console.print(f"  manifest of {manifest.conversion}, {len(manifest.tensors)} tensors")
    reader.check(family)
    console.print("  the tensors are exactly those of config.json")
