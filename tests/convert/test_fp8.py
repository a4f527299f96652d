"""FP8 checkpoints in blocks, as DeepSeek-V3's: read to bfloat16, and written back."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.convert import to_hf, to_megatron
from megatron_rl.convert.to_hf import OutputFormat
from megatron_rl.errors import DataError
from megatron_rl.models.checkpoint_folders import open_checkpoint
from megatron_rl.models.fp8 import dequantize, quantize
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from tests.policy import families

CONSOLE = Console(quiet=True)
SETTINGS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
BLOCK = (128, 128)


def in_float64(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the product of values and scales, block by block, in float64."""
    result = torch.zeros(values.shape, dtype=torch.float64)
    for row in range(0, values.shape[0], block[0]):
        for column in range(0, values.shape[1], block[1]):
            place = slice(row, row + block[0]), slice(column, column + block[1])
            result[place] = values[place].double() * scales[row // block[0], column // block[1]].double()
    return result


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (200, 300), (1, 5), (129, 127)])
def test_dequantization_is_the_product_rounded_once(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values, scales = quantize(torch.randn(shape) * torch.logspace(-6, 3, shape[1]), BLOCK)

    found = dequantize(values, scales, BLOCK)

    # 4 bits of float8 times 24 of float32 fit into float64; float32 and bfloat16 then round once each.
    expected = in_float64(values, scales, BLOCK)
    assert torch.equal(found, expected.float().bfloat16())
    assert float(((found.double() - expected) / expected).nan_to_num().abs().max()) <= 2**-8


@pytest.mark.parametrize("shape", [(128, 256), (200, 300)])
def test_quantization_keeps_three_bits_of_every_value_that_float8_can_hold(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)

    values, scales = quantize(weight, BLOCK)

    error = (in_float64(values, scales, BLOCK) - weight.double()).abs()
    largest = float(scales.max()) * 448
    # half a unit of three stored bits, or of the smallest number below float8's normal range
    assert bool((error <= torch.maximum(weight.double().abs() * 2**-4, torch.tensor(largest / 448 * 2**-10))).all())


def test_unchanged_blocks_keep_their_bytes() -> None:
    torch.manual_seed(0)
    values, scales = quantize(torch.randn(300, 200), BLOCK)
    weight = dequantize(values, scales, BLOCK)
    weight[0, 0] = 1000.0

    again, new = quantize(weight, BLOCK, scales)

    assert torch.equal(new.flatten()[1:], scales.flatten()[1:])
    assert torch.equal(again[128:].view(torch.uint8), values[128:].view(torch.uint8))
    assert float(new[0, 0]) == pytest.approx(1000 / 448)
    assert float(dequantize(again, new, BLOCK)[0, 0]) == 1000.0


def save_fp8(folder: Path, block: int = 32) -> Path:
    """Write a DeepSeek-V3 model with FP8 matrices, in smaller blocks than usual, and return its folder."""
    families.save("deepseek_v3", folder, torch.bfloat16)
    family = family_of(read_hf_config(folder))
    matrices = to_hf.fp8_matrices(family)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = tensor
        if name in matrices:
            tensors[name], tensors[name + "_scale_inv"] = quantize(tensor, (block, block))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**SETTINGS, "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_fp8_checkpoint_becomes_bfloat16_and_is_written_back_byte_for_byte(tmp_path: Path) -> None:
    source = save_fp8(tmp_path / "fp8")
    original = load_file(source / "model.safetensors")

    to_megatron.convert(source, tmp_path / "megatron", 1, CONSOLE)
    to_hf.convert(tmp_path / "megatron", tmp_path / "plain", OutputFormat(), 1, CONSOLE)
    to_hf.convert(tmp_path / "megatron", tmp_path / "again", OutputFormat(fp8=True), 1, CONSOLE)

    plain, again = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "again"))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    expected = in_float64(original[name], original[name + "_scale_inv"], (32, 32))
    assert torch.equal(plain[name], expected.float().bfloat16())
    assert not any(name.endswith("_scale_inv") for name in plain)
    assert "quantization_config" not in read_hf_config(tmp_path / "plain")
    assert again.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert read_hf_config(tmp_path / "again")["quantization_config"]["weight_block_size"] == [32, 32]


def test_a_bfloat16_checkpoint_can_be_written_in_fp8(tmp_path: Path) -> None:
    source = families.save("deepseek_v3", tmp_path / "hf", torch.bfloat16)
    to_megatron.convert(source, tmp_path / "megatron", 1, CONSOLE)
    (tmp_path / "megatron" / "manifest.json").unlink()

    to_hf.convert(tmp_path / "megatron", tmp_path / "fp8", OutputFormat(fp8=True), 1, CONSOLE)

    found = open_checkpoint(tmp_path / "fp8", family_of(read_hf_config(tmp_path / "fp8")))
    name, plain = "model.layers.0.mlp.down_proj.weight", load_file(source / "model.safetensors")
    # three bits are stored: half a unit is 2^-4; values far below the block's largest lose more, in absolute terms less
    error = (found.read(name).float() - plain[name].float()).abs()
    assert float(error.max()) <= float(plain[name].abs().max()) * 2**-4
    assert torch.equal(found.read("model.norm.weight"), plain["model.norm.weight"])


@pytest.mark.parametrize("change", ["lost", "misshapen"])
def test_scales_that_do_not_fit_are_named(tmp_path: Path, change: str) -> None:
    source = save_fp8(tmp_path / "fp8")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    tensors[name] = tensors[name][:, :1].contiguous()
    if change == "lost":
        del tensors[name]
    save_file(tensors, source / "model.safetensors")

    with pytest.raises(DataError, match=rf"{name} is (None|\[2, 1\]), not \(2, 3\)"):
        to_megatron.convert(source, tmp_path / "megatron", 1, CONSOLE)


def test_other_quantization_methods_are_errors(tmp_path: Path) -> None:
    source = families.save("llama", tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))

    with pytest.raises(DataError, match="'gptq'"):
        to_megatron.convert(source, tmp_path / "megatron", 1, CONSOLE)
