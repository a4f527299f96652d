"""Reads megatron-core's distributed checkpoints (``torch_dist``) as Hugging Face tensors."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.errors import DataError
from megatron_rl.models.checkpoint_reader import MAX_LISTED, CheckpointReader, TensorSpec
from megatron_rl.models.hf_mapping.rules import Family, ParamMapping
from megatron_rl.models.hf_mapping.transformer_engine_names import to_local_name, torch_dist_key
from megatron_rl.models.safetensor_files import DTYPES
from megatron_rl.models.torch_dist import MANIFEST, read_metadata, read_region

PASSTHROUGH_PREFIX = "hf."
"""Key prefix of tensors that are copied when converting but are not parameters of the model."""


@dataclass(frozen=True)
class CheckpointSlice:
    """The location of a Megatron parameter (at tensor-parallel size 1) in a distributed checkpoint.

    Attributes:
        key: key of the stored tensor, which may stack several parameters.
        stored_shape: shape of the stored tensor.
        start, slice_shape: the region of the stored tensor, with all of its dimensions.
        shape: shape of the parameter.
    """

    key: str
    stored_shape: tuple[int, ...]
    start: tuple[int, ...]
    slice_shape: tuple[int, ...]
    shape: tuple[int, ...]


def checkpoint_slice(mapping: ParamMapping, layer: int, expert: int, family: Family) -> CheckpointSlice:
    """Return the location of a parameter: one stored tensor per layer, with the experts of a layer stacked."""
    shape = mapping.full_shape
    key = torch_dist_key(mapping, layer, family)
    if not mapping.is_expert:
        return CheckpointSlice(key, shape, (0,) * len(shape), shape, shape)
    return CheckpointSlice(key, (mapping.experts, *shape), (expert, *(0 for _ in shape)), (1, *shape), shape)


class TorchDistReader(CheckpointReader):
    """Reads the tensors of a distributed checkpoint under Hugging Face names."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder = folder
        self.stored = read_metadata(folder)
        local = {to_local_name(key): key for key in self.stored}
        self._slices: dict[str, tuple[ParamMapping, CheckpointSlice, int]] = {}
        specs: dict[str, TensorSpec] = {}
        problems = []
        for mapping, layer, expert in family.parameters():
            where = _resolve(checkpoint_slice(mapping, layer, expert, family), layer, family, local)
            if where is None:
                continue
            stored = self.stored[where.key]
            if not _has_expected_shape(stored.shape, where.stored_shape, mapping):
                found, expected = list(stored.shape), list(where.stored_shape)
                problems.append(f"wrong shape: {where.key} is {found}, expected {expected}")
            for part, (hf_name, shape) in enumerate(zip(mapping.hf_names(layer, expert), mapping.shapes, strict=True)):
                self._slices[hf_name] = (mapping, where, part)
                specs[hf_name] = TensorSpec(shape, stored.dtype)
        if problems:
            shown = "\n  ".join(dict.fromkeys(problems[: MAX_LISTED * 8]))
            raise DataError(f"the checkpoint in {str(folder)!r} does not fit its config.json:\n  {shown}")
        for key, stored in self.stored.items():
            if key.startswith(PASSTHROUGH_PREFIX):
                specs[key.removeprefix(PASSTHROUGH_PREFIX)] = TensorSpec(stored.shape, stored.dtype)
        self.specs = specs
        self._digests = _manifest_digests(folder, specs)
        self._last: tuple[CheckpointSlice, tuple[Tensor, ...]] | None = None

    def read(self, name: str) -> Tensor:
        """Return a tensor. The other parts of the same Megatron parameter are cached until the next call.

        Raises:
            DataError: its SHA-256 is not the one in the manifest of the conversion, if there is one.
        """
        tensor = self._stored(name)
        expected = self._digests.get(name)
        if expected is not None:
            found = hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().data).hexdigest()
            if found != expected:
                raise DataError(f"{name} in {self.folder} was modified or is damaged; convert the model again")
        return tensor

    def _stored(self, name: str) -> Tensor:
        if name not in self._slices:
            key = PASSTHROUGH_PREFIX + name
            stored = self.stored[key]
            return read_region(self.folder, key, stored, [0] * len(stored.shape), stored.shape)
        mapping, where, part = self._slices[name]
        if self._last is None or self._last[0] != where:
            self._last = None
            parameter = read_region(self.folder, where.key, self.stored[where.key], where.start, where.slice_shape)
            self._last = where, mapping.rule.merge([parameter.view(where.shape)])
        parts = self._last[1]
        if part == len(parts) - 1:
            self._last = None
        return parts[part].contiguous()


def _manifest_digests(folder: Path, specs: Mapping[str, TensorSpec]) -> Mapping[str, str]:
    """Return the SHA-256 of each tensor from the manifest that ``megatron-rl convert`` wrote; empty without one.

    Tensors that the original checkpoint has in another dtype, such as FP8, are left out.

    Raises:
        DataError: the manifest cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_bytes())["tensors"]
        return {
            entry["name"]: entry["sha256"]
            for entry in entries
            if (spec := specs.get(entry["name"])) is not None and DTYPES[entry["dtype"]] == spec.dtype
        }
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}; convert the model again") from error


def _resolve(where: CheckpointSlice, layer: int, family: Family, local: Mapping[str, str]) -> CheckpointSlice | None:
    """Return the location with the key that this checkpoint uses; None if the checkpoint lacks the parameter.

    Other programs may use the local layer spec's names for norms, or stack all layers in one tensor.
    """
    key = local.get(to_local_name(where.key))
    if key is not None:
        return replace(where, key=key)
    prefix = f"decoder.layers.{layer}."
    key = local.get(to_local_name(where.key).replace(prefix, "decoder.layers."))
    if key is None or not where.key.startswith(prefix):
        return None
    stored_shape = (family.num_layers, *where.stored_shape)
    return CheckpointSlice(key, stored_shape, (layer, *where.start), (1, *where.slice_shape), where.shape)


def _has_expected_shape(found: tuple[int, ...], expected: tuple[int, ...], mapping: ParamMapping) -> bool:
    """Return whether a stored shape is as expected; vocabulary rows may be padded."""
    if mapping.megatron.endswith(("word_embeddings.weight", "output_layer.weight")):
        return len(found) == len(expected) and found[0] >= expected[0] and found[1:] == expected[1:]
    return found == expected
