"""The ``quantization_config`` of each encoding that a user can name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.config.encodings import EncodingName
from megatron_rl.errors import DataError
from megatron_rl.models.encodings import QUANTIZATION_CONFIG, WeightEncoding, encoding_of, served_shapes
from megatron_rl.models.hf_mapping.rules import Family, HFConfig

_DYNAMIC_FP8 = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}


def _block_fp8(excluded: Sequence[str]) -> HFConfig:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": list(excluded),
    }


def _compressed_tensors(packing: str, excluded: Sequence[str], inputs: object, **weights: object) -> HFConfig:
    scheme = {"symmetric": True, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(excluded),
    }


_SETTINGS: Mapping[EncodingName, Callable[[Sequence[str]], HFConfig]] = {
    "fp8": _block_fp8,
    "fp8_ue8m0": lambda excluded: {**_block_fp8(excluded), "scale_fmt": "ue8m0"},
    "fp8_channel": lambda excluded: _compressed_tensors(
        "float-quantized", excluded, _DYNAMIC_FP8, num_bits=8, type="float", strategy="channel"
    ),
    "int4": lambda excluded: _compressed_tensors(
        "pack-quantized", excluded, None, num_bits=4, type="int", strategy="group", group_size=32
    ),
    "mxfp4": lambda excluded: {"quant_method": "mxfp4", "modules_to_not_convert": list(excluded)},
}


def settings_of(encoding: EncodingName, excluded: Sequence[str]) -> HFConfig:
    """Return the ``quantization_config`` of a named encoding that leaves out these modules."""
    return _SETTINGS[encoding](excluded)


def plain_modules(family: Family, quantized: frozenset[str]) -> list[str]:
    """Return the modules with a matrix that is not quantized and is not the embedding: output head and routers."""
    return [
        name.removesuffix(".weight")
        for name, shape in family.hf_shapes().items()
        if name.endswith(".weight") and len(shape) == 2 and name not in quantized and "embed" not in name
    ]


@dataclass(frozen=True)
class NamedEncoding:
    """An encoding of a whole model, and the ``quantization_config`` that declares it."""

    settings: HFConfig
    encoding: WeightEncoding


def named_encoding(name: EncodingName, hf: HFConfig, family: Family) -> NamedEncoding:
    """Return a named encoding of all tensors of a model that it can hold.

    Raises:
        DataError: it can hold none, or not all matrices.
    """
    whole = encoding_of({**hf, QUANTIZATION_CONFIG: settings_of(name, ())}, family)
    assert whole is not None, "the settings have a quantization"
    require_shapes(whole, family)
    settings = settings_of(name, plain_modules(family, whole.names))
    encoding = encoding_of({**hf, QUANTIZATION_CONFIG: settings}, family)
    assert encoding is not None, "the settings have a quantization"
    return NamedEncoding(settings, encoding)


def require_shapes(encoding: WeightEncoding, family: Family) -> None:
    """Check that the format can hold the tensors that are quantized.

    Raises:
        DataError: it cannot.
    """
    shapes, label = served_shapes(family), encoding.format.label
    if not encoding.names:
        raise DataError(
            f"no tensor of this model can be {label}: MXFP4 is for experts in one tensor, as in gpt-oss, the others"
            " are for single matrices; choose another encoding, or none"
        )
    for name in sorted(encoding.names):
        if encoding.format.layout(shapes[name]) is None:
            raise DataError(
                f"{name} has shape {list(shapes[name])}, which {label} cannot hold; choose another encoding, or none"
            )
