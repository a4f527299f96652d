"""MXFP4 checkpoints, as gpt-oss is published: read to bfloat16 exactly, and written back in bfloat16."""

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_rl.convert import to_hf, to_megatron
from megatron_rl.convert.to_hf import OutputFormat
from megatron_rl.convert.verify import compare
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.models.checkpoint_folders import open_checkpoint
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.mxfp4 import MXFP4Format
from tests.policy import families

CONSOLE = Console(quiet=True)
QUANTIZED = ("gate_up_proj", "down_proj")


def number(pattern: int) -> float:
    """Return what four bits mean, from the specification: sign, exponent with bias 1, mantissa; 0.5 is subnormal."""
    sign, exponent, mantissa = -1.0 if pattern & 8 else 1.0, pattern >> 1 & 3, pattern & 1
    return sign * (0.5 * mantissa if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def random_blocks(*shape: int) -> tuple[Tensor, Tensor]:
    """Return blocks [..., 16] and scales [...] of this many blocks; the numbers are between 2^-7 and 6 / 8."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
    return blocks, torch.randint(121, 125, shape, generator=generator).to(torch.uint8)


@pytest.mark.parametrize("scale", [0, 1, 100, 127, 140, 252])
def test_every_pattern_under_a_scale_is_the_specification_s_number(scale: int) -> None:
    low, high = torch.arange(16), torch.arange(16).flip(0)
    blocks = (low + 16 * high).to(torch.uint8)[None, None]

    (found,) = MXFP4Format().decode(blocks, torch.tensor([[scale]], dtype=torch.uint8)).T

    expected = [number(part) * 2.0 ** (scale - 127) for byte in range(16) for part in (byte, 15 - byte)]
    assert found.dtype is torch.bfloat16
    assert found.double().tolist() == expected
    assert [math.copysign(1, value) for value in found.tolist()] == [math.copysign(1, value) for value in expected]


def test_the_scale_that_is_no_number_makes_none() -> None:
    blocks, scales = random_blocks(2, 1)
    scales[0] = 255
    assert MXFP4Format().decode(blocks, scales).isnan().sum(0).tolist() == [32, 0]


def test_it_is_what_transformers_reads() -> None:
    blocks, scales = random_blocks(3, 10, 4)
    assert torch.equal(MXFP4Format().decode(blocks, scales), convert_moe_packed_tensors(blocks, scales))


def published(folder: Path) -> tuple[Path, Path]:
    """Return a tiny gpt-oss with random blocks, and the same with what transformers makes of them in bfloat16."""
    plain, quantized = families.save("gpt_oss", folder / "plain", torch.bfloat16), folder / "quantized"
    quantized.mkdir()
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(QUANTIZED):
            del stored[name]
            experts, rows, columns = tensor.shape
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = random_blocks(experts, columns, rows // 32)
            tensors[name] = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, quantized / "model.safetensors", {"format": "pt"})
    hf = json.loads((plain / "config.json").read_text())
    hf["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (quantized / "config.json").write_text(json.dumps(hf))
    return quantized, plain


def test_a_published_checkpoint_is_read_and_comes_back_in_bfloat16(tmp_path: Path) -> None:
    quantized, plain = published(tmp_path)

    manifest = to_megatron.convert(quantized, tmp_path / "megatron", 2, CONSOLE)
    to_hf.convert(tmp_path / "megatron", tmp_path / "again", OutputFormat(), 2, CONSOLE)

    assert {row.name for row in manifest.tensors} == load_file(quantized / "model.safetensors").keys()
    for folder in (tmp_path / "megatron", tmp_path / "again"):
        assert compare(quantized, folder, 1, CONSOLE).is_same
        assert "quantization_config" not in read_hf_config(folder)
    expected, found = (load_file(folder / "model.safetensors") for folder in (plain, tmp_path / "again"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_without_a_manifest_the_experts_of_a_layer_are_one_tensor_still(tmp_path: Path) -> None:
    plain = families.save("gpt_oss", tmp_path / "plain")
    to_megatron.convert(plain, tmp_path / "megatron", 2, CONSOLE)
    (tmp_path / "megatron" / "manifest.json").unlink()

    to_hf.convert(tmp_path / "megatron", tmp_path / "again", OutputFormat(), 2, CONSOLE)

    expected, found = (load_file(folder / "model.safetensors") for folder in (plain, tmp_path / "again"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ConfigError, match=r"one tensor only.*--split-experts"):
        to_hf.convert(tmp_path / "megatron", tmp_path / "split", OutputFormat(split_experts=True), 1, CONSOLE)


@pytest.mark.parametrize("damage", ["no scales", "misshapen"])
def test_blocks_without_the_scales_that_they_need_are_one_error(tmp_path: Path, damage: str) -> None:
    quantized, _ = published(tmp_path)
    tensors = load_file(quantized / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    scales = tensors.pop(name)
    if damage == "misshapen":
        tensors[name] = scales[:, :, :-1].contiguous()
    save_file(tensors, quantized / "model.safetensors")

    with pytest.raises(DataError, match=r"down_proj_blocks.*down_proj_scales is"):
        open_checkpoint(quantized, family_of(read_hf_config(quantized)))
