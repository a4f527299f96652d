"""Which tensors of a model are quantized, and how: read from ``quantization_config``, applied to merged tensors.

Conversion and weight pushes use ``WeightEncoding``. Exclusions follow transformers (``modules_to_not_convert``) and
compressed-tensors (``ignore``).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rl.errors import DataError
from megatron_rl.models.channel_fp8 import ChannelFP8Format
from megatron_rl.models.fp8 import FP8Format
from megatron_rl.models.hf_mapping.rules import Family, HFConfig, Shape
from megatron_rl.models.int4 import INT4Format
from megatron_rl.models.mxfp4 import MXFP4Format
from megatron_rl.models.quantized_format import QuantizedFormat
from megatron_rl.models.safetensor_files import FileTensor

QUANTIZATION_CONFIG = "quantization_config"
SUPPORTED = (
    "mxfp4; fp8 with two block sizes; compressed-tensors with per-channel FP8 or symmetric INT4 in groups, of all "
    "Linear layers; and checkpoints that are not quantized"
)
EncodedSpecs = Mapping[str, tuple[Shape, torch.dtype]]
"""Name of each encoded tensor -> its shape and dtype."""


@dataclass(frozen=True)
class WeightEncoding:
    """How the tensors of a model are sent or stored.

    Attributes:
        format: the quantized format.
        names: Hugging Face names of the tensors that are quantized.
        plain_dtype: dtype of the other floating-point tensors; None keeps each tensor's.
    """

    format: QuantizedFormat
    names: frozenset[str]
    plain_dtype: torch.dtype | None = None

    def encoded(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) as the reader of this encoding expects them, each on the device of its source."""
        for name, tensor in tensors:
            if name in self.names:
                for suffix, part in self.format.encode(tensor.detach()).items():
                    yield name + suffix, part
            elif self.plain_dtype is not None and tensor.is_floating_point():
                yield name, tensor.to(self.plain_dtype)
            else:
                yield name, tensor
            del tensor  # free it before the next one is made

    def specs(self, shapes: Mapping[str, Shape]) -> EncodedSpecs:
        """Return the specs of the quantized tensors of a model whose tensors have these shapes."""
        found: dict[str, tuple[Shape, torch.dtype]] = {}
        for name in self.names:
            for suffix, spec in (self.format.layout(shapes[name]) or {}).items():
                found[name + suffix] = spec
        return found


def format_of(hf: HFConfig) -> QuantizedFormat | None:
    """Return the quantized format that config.json declares; None if the checkpoint is not quantized.

    Raises:
        DataError: the quantization is not supported.
    """
    settings = hf.get(QUANTIZATION_CONFIG)
    if not settings:
        return None
    method, block = settings.get("quant_method"), settings.get("weight_block_size")
    if method == "mxfp4":
        return MXFP4Format()
    if method == "fp8" and isinstance(block, list) and len(block) == 2:
        power_of_two = settings.get("scale_fmt") == "ue8m0"
        scale_dtype = torch.float8_e8m0fnu if power_of_two else torch.float32
        return FP8Format((int(block[0]), int(block[1])), power_of_two, scale_dtype)
    if method == "compressed-tensors" and (found := _compressed_tensors(settings)) is not None:
        return found
    block_size = f" with weight_block_size {block!r}" if method == "fp8" else ""
    raise DataError(
        f"quantization_config {method!r}{block_size} of config.json is not supported; supported: {SUPPORTED}"
    )


def _compressed_tensors(settings: Mapping[str, Any]) -> QuantizedFormat | None:
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        return None
    (group,) = groups.values()
    weights = group.get("weights") or {}
    if group.get("targets") != ["Linear"] or not weights.get("symmetric", True) or weights.get("actorder"):
        return None
    kind = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
    if kind == ("float", 8, "channel"):
        return ChannelFP8Format()
    size = weights.get("group_size")
    if kind == ("int", 4, "group") and isinstance(size, int) and size > 0 and size % 8 == 0:
        return INT4Format(size)
    return None


def encoding_of(hf: HFConfig, family: Family, stored: Mapping[str, FileTensor] | None = None) -> WeightEncoding | None:
    """Return the encoding that config.json declares; None if the checkpoint is not quantized.

    Args:
        hf: the parsed config.json.
        family: the model's family.
        stored: the tensors of the checkpoint's files, whose scales have the dtype that is used; None: the usual one.

    Raises:
        DataError: the quantization is not supported.
    """
    quantized = format_of(hf)
    if quantized is None:
        return None
    excluded = _exclusion(hf[QUANTIZATION_CONFIG])
    names = frozenset(name for name in quantizable(family, quantized) if not excluded(name.removesuffix(".weight")))
    scales = [stored[name] for name in (n + quantized.scales_suffix for n in names) if stored and name in stored]
    dtypes = {tensor.dtype for tensor in scales}
    return WeightEncoding(quantized.with_scale_dtype(dtypes.pop()) if len(dtypes) == 1 else quantized, names)


def quantizable(family: Family, quantized: QuantizedFormat) -> frozenset[str]:
    """Return the names of the tensors that a format can hold: without embedding, output head and routers.

    MXFP4 holds the stacked weights of experts; the other formats hold single matrices.
    """
    if isinstance(quantized, MXFP4Format):
        ranks = {name: len(shape) for name, shape in family.hf_shapes().items()}
        stacks = family.fused_parts(required=True)
        return frozenset(stack for stack, parts in stacks.items() if ranks[parts[0]] == 2)
    stacked = family.stacked_names
    return frozenset(
        hf_name
        for mapping in family.mappings
        if "linear_" in mapping.megatron and len(mapping.shapes[0]) == 2 and mapping.hf[0] not in stacked
        for layer, expert in mapping.instances()
        for hf_name in mapping.hf_names(layer, expert)
    )


def served_shapes(family: Family) -> dict[str, Shape]:
    """Return the shape of every tensor of an export, by name: experts that only exist in stacked form are stacked."""
    shapes = family.hf_shapes()
    for stack, parts in family.fused_parts(required=True).items():
        shape = shapes[parts[0]]
        for part in parts:
            del shapes[part]
        shapes[stack] = (len(parts), *shape)
    return shapes


def encoding_problems(
    encoding: WeightEncoding | None, family: Family, stored: Mapping[str, FileTensor]
) -> Iterator[str]:
    """Yield how the tensors of a served folder differ from what a push would send; nothing if they agree.

    Compared are names and dtypes of quantized tensors and of their scales, not of the others.
    """
    shapes = served_shapes(family)
    expected = encoding.specs(shapes) if encoding is not None else {}
    for name, (shape, dtype) in expected.items():
        found = stored.get(name)
        if found is None:
            yield f"{name} would be sent, and is not there"
        elif (found.shape, found.dtype) != (shape, dtype):
            yield (
                f"{name} is {_dtype_name(found.dtype)} {list(found.shape)}, and would be sent as {_dtype_name(dtype)} "
                f"{list(shape)}"
            )
    for name, tensor in stored.items():
        if name in shapes and name not in expected and tensor.dtype.itemsize == 1:
            yield f"{name} is {_dtype_name(tensor.dtype)}, and would not be quantized"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _exclusion(settings: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return whether the quantization leaves out a module, given its name."""
    if settings.get("quant_method") == "compressed-tensors":
        return lambda module: _is_ignored(module, settings.get("ignore") or ())
    return lambda module: _is_not_converted(module, settings.get("modules_to_not_convert") or ())


def _is_ignored(module: str, entries: Sequence[str]) -> bool:
    """Return whether an entry is the module's name, or ``re:`` and a pattern that matches its beginning."""
    return any(
        re.match(entry.removeprefix("re:"), module) is not None if entry.startswith("re:") else entry == module
        for entry in entries
    )


def _is_not_converted(module: str, entries: Sequence[str]) -> bool:
    """Return whether an entry matches the module's name up to the end of a component, or is its end."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{entry}){boundary}", module) or module.endswith(entry) for entry in entries)
