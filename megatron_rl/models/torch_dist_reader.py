"""Reads megatron-core's distributed checkpoints (``torch_dist``) as Hugging Face tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_rl.errors import DataError
from megatron_rl.models.checkpoint_reader import SHOWN, CheckpointReader, TensorSpec
from megatron_rl.models.hf_mapping.rules import Family, ParamMapping
from megatron_rl.models.hf_mapping.transformer_engine_names import to_local_name, torch_dist_key
from megatron_rl.models.torch_dist import StoredTensor, read_metadata, read_region

CARRIED = "hf."
"""In front of the key of a tensor that only goes along."""


@dataclass(frozen=True)
class CheckpointSlice:
    """Where a whole Megatron tensor (as one tensor-parallel rank has it) is in a checkpoint.

    Attributes:
        key: of the tensor that it is, or is a part of.
        full: shape of that tensor.
        start, box: the part, with all of that tensor's dimensions.
        shape: of the Megatron tensor itself.
    """

    key: str
    full: tuple[int, ...]
    start: tuple[int, ...]
    box: tuple[int, ...]
    shape: tuple[int, ...]


def checkpoint_slice(name: ParamMapping, layer: int, expert: int, family: Family) -> CheckpointSlice:
    """Return where a tensor of the table is saved: layers apart, the experts of a layer stacked."""
    shape = name.full_shape
    key = torch_dist_key(name, layer, family)
    if not name.is_expert:
        return CheckpointSlice(key, shape, (0,) * len(shape), shape, shape)
    return CheckpointSlice(key, (name.experts, *shape), (expert, *(0 for _ in shape)), (1, *shape), shape)


class TorchDistReader(CheckpointReader):
    """The tensors of a distributed checkpoint under Hugging Face names."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder = folder
        self.saved = read_metadata(folder)
        local = {to_local_name(key): key for key in self.saved}
        self._places: dict[str, tuple[ParamMapping, CheckpointSlice, int]] = {}
        specs: dict[str, TensorSpec] = {}
        problems = []
        for name in family.mappings:
            for layer, expert in name.instances():
                place = _found(checkpoint_slice(name, layer, expert, family), layer, family, local, self.saved)
                if place is None:
                    continue
                saved = self.saved[place.key]
                if not _fits(saved.shape, place.full, name):
                    problems.append(f"misshapen: {place.key} is {list(saved.shape)}, expected {list(place.full)}")
                for part, (hf_name, shape) in enumerate(zip(name.hf_names(layer, expert), name.shapes, strict=True)):
                    self._places[hf_name] = (name, place, part)
                    specs[hf_name] = TensorSpec(shape, saved.dtype)
        if problems:
            shown = "\n  ".join(dict.fromkeys(problems[: SHOWN * 8]))
            raise DataError(f"the checkpoint in {str(folder)!r} does not fit its config.json:\n  {shown}")
        carried = {key.removeprefix(CARRIED): saved for key, saved in self.saved.items() if key.startswith(CARRIED)}
        self.specs: Mapping[str, TensorSpec] = specs | {key: TensorSpec(s.shape, s.dtype) for key, s in carried.items()}
        self._last: tuple[CheckpointSlice, tuple[Tensor, ...]] | None = None

    def read(self, name: str) -> Tensor:
        """Return a tensor. The other parts of the same Megatron tensor are kept until the next call."""
        if name not in self._places:
            key = CARRIED + name
            saved = self.saved[key]
            return read_region(self.folder, key, saved, [0] * len(saved.shape), saved.shape)
        entry, place, part = self._places[name]
        if self._last is None or self._last[0] != place:
            self._last = None
            whole = read_region(self.folder, place.key, self.saved[place.key], place.start, place.box)
            self._last = place, entry.rule.merge([whole.view(place.shape)])
        parts = self._last[1]
        if part == len(parts) - 1:
            self._last = None
        return parts[part].contiguous()


def _found(
    place: CheckpointSlice, layer: int, family: Family, local: Mapping[str, str], saved: Mapping[str, StoredTensor]
) -> CheckpointSlice | None:
    """Return the place under the name that the checkpoint has for it; None if it has none.

    Other programs may name norms as the local layers do, or stack all layers of a model in one tensor.
    """
    key = local.get(to_local_name(place.key))
    if key is not None:
        return CheckpointSlice(key, place.full, place.start, place.box, place.shape)
    prefix = f"decoder.layers.{layer}."
    key = local.get(to_local_name(place.key).replace(prefix, "decoder.layers."))
    if key is None or not place.key.startswith(prefix):
        return None
    full = (family.num_layers, *place.full)
    return CheckpointSlice(key, full, (layer, *place.start), (1, *place.box), place.shape)


def _fits(found: tuple[int, ...], expected: tuple[int, ...], name: ParamMapping) -> bool:
    """Return whether a shape is right; rows of the vocabulary may be padded."""
    if name.megatron.endswith(("word_embeddings.weight", "output_layer.weight")):
        return len(found) == len(expected) and found[0] >= expected[0] and found[1:] == expected[1:]
    return found == expected
