"""Encoders: equal to the reference quantizers byte for byte, read back exactly, and applied to the right tensors.

``KNOWN`` was made with the reference packages on a CPU (transformers 5.23.0, compressed-tensors 0.20.1, torchao 0.18.0,
torch 2.13) from ``matrix``. The tests against the packages themselves run where these are installed.
"""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.convert import to_hf, to_megatron
from megatron_rl.convert.to_hf import OutputFormat
from megatron_rl.errors import DataError
from megatron_rl.models.channel_fp8 import ChannelFP8Format
from megatron_rl.models.encodings import encoding_of, encoding_problems, format_of, quantizable, served_shapes
from megatron_rl.models.fp8 import FP8Format
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.hf_reader import HFCheckpointReader, read_headers
from megatron_rl.models.int4 import INT4Format, pack, unpack
from megatron_rl.models.mxfp4 import MXFP4Format, quantize_blocks
from megatron_rl.models.quantized_format import QuantizedFormat
from tests.policy import families

UE8M0 = FP8Format((128, 128), True, torch.float8_e8m0fnu)
FORMATS = {
    "fp8": FP8Format((128, 128)),
    "fp8 ue8m0": UE8M0,
    "channel fp8": ChannelFP8Format(),
    "int4": INT4Format(32),
    "mxfp4": MXFP4Format(),
}
KNOWN = {
    "channel fp8": {"": "0d75c70d075e0e43", "_scale": "14f1005f6a26af75"},
    "fp8": {"": "5c1831e0f88560d9", "_scale_inv": "7726c0558a02873f"},
    "fp8 ue8m0": {"": "e28c6389e50aac23", "_scale_inv": "67987514772e6c30"},
    "int4": {"_packed": "0a5ab5ef00838c76", "_scale": "36aa98b480e8ab40", "_shape": "e254b6f7cb2745c4"},
    "mxfp4": {"_blocks": "e481d99b04780cc1", "_scales": "23591d1a3ec4c832"},
}


def matrix(rows: int = 256, columns: int = 384) -> Tensor:
    """Return a bfloat16 matrix of integers and powers of two, the same with every torch, with a block of zeros."""
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None]
    values = ((row * 7919 + column * 104729) % 2003 - 1001) * 2.0 ** (column % 13 - row % 5 - 12)
    values[:128, :128] = 0
    return values.bfloat16()


def digest(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return the first digits of each tensor's SHA-256."""
    return {
        name: hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()[:16]
        for name, tensor in tensors.items()
    }


def same(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors have the same shape and bytes."""
    return found.shape == expected.shape and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("name", FORMATS)
def test_the_bytes_are_those_of_the_reference_quantizers(name: str) -> None:
    assert digest(FORMATS[name].encode(matrix())) == KNOWN[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", ["float", "ue8m0"])
def test_block_fp8_equals_transformers(scales: str, dtype: torch.dtype) -> None:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if "scale_fmt" not in Path(module.__file__).read_text():
        pytest.skip("this transformers has no ue8m0 scales")
    torch.manual_seed(0)
    weight = (torch.randn(256, 384) * torch.logspace(-6, 3, 384)).to(dtype)
    weight[:128, :128] = 0
    config = SimpleNamespace(weight_block_size=[128, 128], scale_fmt=scales)
    expected = module.Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"x.weight": weight})

    found = (UE8M0 if scales == "ue8m0" else FP8Format((128, 128))).encode(weight)

    assert same(found[""], expected["x.weight"])
    assert same(found["_scale_inv"], expected["x.weight_scale_inv"])


def test_channel_fp8_and_int4_equal_compressed_tensors() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    torch.manual_seed(0)
    weight = (torch.randn(96, 384) * torch.logspace(-6, 3, 384)).bfloat16()
    weight[3] = 0

    channel = quantization.QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
    scales, zero = utils.calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), channel)
    found = ChannelFP8Format().encode(weight)
    assert same(found[""], forward.quantize(weight, scales, zero, channel, dtype=torch.float8_e4m3fn))
    assert same(found["_scale"], scales)

    group = quantization.QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
    groups = weight.unflatten(1, (-1, 32))
    scales, zero = utils.calculate_qparams(groups.amin(2), groups.amax(2), group)
    found = INT4Format(32).encode(weight)
    assert same(
        found["_packed"], helpers.pack_to_int32(forward.quantize(weight, scales, zero, group, dtype=torch.int8), 4)
    )
    assert same(found["_scale"], scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_equals_torchao(dtype: torch.dtype) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    torch.manual_seed(0)
    values = (torch.randn(64, 384) * torch.logspace(-3, 3, 384)).to(dtype)
    values[3] = 0
    values[4, :32] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4)  # every tie
    values[5, :32] = -values[4, :32]
    scales, blocks = mx.to_mx(values, torch.float4_e2m1fn_x2, 32, mx.ScaleCalculationMode.RCEIL)

    found, found_scales = quantize_blocks(values)

    assert torch.equal(found.flatten(), blocks.view(torch.uint8).flatten())
    assert torch.equal(found_scales.flatten(), scales.view(torch.uint8).flatten())


@pytest.mark.parametrize("name", FORMATS)
def test_the_layout_is_that_of_the_encoded_tensors(name: str) -> None:
    quantized = FORMATS[name]
    found = {suffix: (tuple(part.shape), part.dtype) for suffix, part in quantized.encode(matrix()).items()}
    assert found == quantized.layout((256, 384))
    assert quantized.shape(found[quantized.values_suffix][0]) == (256, 384)
    assert quantized.scales_shape(found[quantized.values_suffix][0]) == found[quantized.scales_suffix][0]


@pytest.mark.parametrize("name", ["mxfp4", "fp8 ue8m0"])
def test_decoded_values_are_reproduced_exactly_with_scales_that_are_powers_of_two(name: str) -> None:
    once = decoded(FORMATS[name], matrix())
    assert torch.equal(decoded(FORMATS[name], once), once)


def decoded(quantized: QuantizedFormat, weight: Tensor) -> Tensor:
    parts = quantized.encode(weight)
    return quantized.decode(parts[quantized.values_suffix], parts[quantized.scales_suffix])


def test_packed_words_are_read_back() -> None:
    values = torch.arange(-8, 8).repeat(3, 4).int()
    assert torch.equal(unpack(pack(values)), values)


CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
    "ignore": ["lm_head"],
}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True},
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
CONFIGS = {
    "fp8": FP8,
    "fp8 ue8m0": {**FP8, "scale_fmt": "ue8m0"},
    "fp8 without one layer": {**FP8, "modules_to_not_convert": ["model.layers.1", "mlp.gate"]},
    "channel": CHANNEL,
    "int4": INT4,
}


def save_quantized(folder: Path, settings: object, family_name: str = "deepseek_v3") -> dict[str, Tensor]:
    """Write a quantized model, and return its tensors before that."""
    families.save(family_name, folder, torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    hf = read_hf_config(folder)
    plain = load_file(folder / "model.safetensors")
    encoding = encoding_of(hf, family_of(hf))
    assert encoding is not None
    save_file(dict(encoding.encoded(plain.items())), folder / "model.safetensors", {"format": "pt"})
    return plain


@pytest.mark.parametrize("name", CONFIGS)
def test_a_written_checkpoint_is_read_as_values_times_scales(name: str, tmp_path: Path) -> None:
    plain = save_quantized(tmp_path, CONFIGS[name])
    hf = read_hf_config(tmp_path)
    family = family_of(hf)
    stored = read_headers(tmp_path)
    encoding = encoding_of(hf, family, stored)
    assert encoding is not None
    reader = HFCheckpointReader(tmp_path, family, hf)
    reader.check(family)
    assert not list(encoding_problems(encoding, family, stored))
    for key, tensor in plain.items():
        expected = decoded(encoding.format, tensor) if key in encoding.names else tensor
        assert torch.equal(reader.read(key), expected), key
    assert sum(key in encoding.names for key in plain) > 3


@pytest.mark.parametrize("name", ["channel", "int4"])
def test_a_quantized_checkpoint_is_converted_to_bfloat16(name: str, tmp_path: Path) -> None:
    console = Console(quiet=True)
    save_quantized(tmp_path / "hf", CONFIGS[name])
    to_megatron.convert(tmp_path / "hf", tmp_path / "megatron", 1, console)
    to_hf.convert(tmp_path / "megatron", tmp_path / "plain", OutputFormat(), 1, console)

    hf = read_hf_config(tmp_path / "hf")
    reader = HFCheckpointReader(tmp_path / "hf", family_of(hf), hf)
    found = load_file(tmp_path / "plain" / "model.safetensors")
    assert found.keys() == reader.specs.keys()
    assert all(torch.equal(found[key], reader.read(key)) for key in found)
    assert "quantization_config" not in read_hf_config(tmp_path / "plain")


def test_exclusions_are_honored(tmp_path: Path) -> None:
    hf = read_hf_config(families.save("deepseek_v3", tmp_path))
    family = family_of(hf)
    whole = quantizable(family, FP8Format((16, 16)))
    names = {key: encoding_of({**hf, "quantization_config": config}, family) for key, config in CONFIGS.items()}
    found = {key: encoding.names for key, encoding in names.items() if encoding is not None}
    assert found["fp8"] == found["channel"] == whole
    assert found["fp8 without one layer"] == {name for name in whole if ".layers.1." not in name}
    assert found["int4"] == {name for name in whole if ".mlp.experts." in name}
    assert not any("embed" in name or "lm_head" in name or name.endswith("mlp.gate.weight") for name in whole)


def test_gpt_oss_encodes_the_stacked_weights_of_its_experts(tmp_path: Path) -> None:
    plain = save_quantized(tmp_path, {"quant_method": "mxfp4"}, "gpt_oss")
    hf = read_hf_config(tmp_path)
    family = family_of(hf)
    encoding = encoding_of(hf, family)
    assert encoding is not None
    assert encoding.names == {n for n in plain if n.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    stored = read_headers(tmp_path)
    assert not list(encoding_problems(encoding, family, stored))
    assert set(served_shapes(family)) == set(plain)


def test_a_folder_that_contradicts_its_config_is_described(tmp_path: Path) -> None:
    save_quantized(tmp_path, FP8)
    hf = read_hf_config(tmp_path)
    family = family_of(hf)
    excluding = {**hf, "quantization_config": {**FP8, "modules_to_not_convert": ["model.layers.1.self_attn"]}}
    problems = list(encoding_problems(encoding_of(excluding, family), family, read_headers(tmp_path)))
    assert problems
    assert all("would not be quantized" in problem for problem in problems)
    channel = encoding_of({**hf, "quantization_config": CHANNEL}, family)
    assert any(
        "_scale would be sent, and is not there" in p
        for p in encoding_problems(channel, family, read_headers(tmp_path))
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq"},
        {"quant_method": "fp8"},
        {**CHANNEL, "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}}},
        {**CHANNEL, "config_groups": {"a": {"targets": ["re:.*up"], "weights": {}}}},
    ],
)
def test_an_unknown_quantization_is_an_error(settings: object) -> None:
    with pytest.raises(DataError, match="is not supported; supported: mxfp4; fp8 with two block sizes"):
        format_of({"quantization_config": settings})
