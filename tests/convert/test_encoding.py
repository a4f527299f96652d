"""megatron-to-hf --encoding: a folder in a quantized format, with the encoders' bytes, that transformers loads."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.cli import main
from megatron_rl.config.encodings import EncodingName
from megatron_rl.convert import to_hf, to_megatron
from megatron_rl.convert.to_hf import OutputFormat
from megatron_rl.errors import DataError
from megatron_rl.models.checkpoint_folders import open_checkpoint
from megatron_rl.models.encodings import encoding_of, encoding_problems
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.hf_reader import read_headers
from megatron_rl.weights.checksum import sha256
from tests.policy import families

CONSOLE = Console(quiet=True)
CASES: dict[EncodingName, str] = {
    "fp8": "deepseek_v3",
    "fp8_ue8m0": "qwen3_moe",
    "fp8_channel": "qwen3_moe",
    "mxfp4": "gpt_oss",
}


def encoded(family: str, name: EncodingName, folder: Path) -> tuple[Path, Path]:
    """Write a model, and that model in a named encoding; return both folders."""
    plain, target = families.save(family, folder / "plain", torch.bfloat16), folder / "encoded"
    to_megatron.convert(plain, folder / "core", 1, CONSOLE)
    to_hf.convert(folder / "core", target, OutputFormat(encoding=name), 1, CONSOLE)
    return plain, target


@pytest.mark.parametrize("name", CASES)
def test_the_folder_has_the_bytes_of_the_encoders(name: EncodingName, tmp_path: Path) -> None:
    plain, target = encoded(CASES[name], name, tmp_path)
    hf = read_hf_config(target)
    family = family_of(hf)
    stored = read_headers(target)
    encoding = encoding_of(hf, family, stored)
    assert encoding is not None
    assert not list(encoding_problems(encoding, family, stored))
    source = open_checkpoint(plain, family)
    source.check(family)
    stacks = family.fused_parts(required=True)
    tensors = {part: source.read(part) for part in source.specs}
    for stack, parts in stacks.items():
        tensors[stack] = torch.stack([tensors.pop(part) for part in parts])
    expected = dict(encoding.encoded(tensors.items()))
    found = load_file(target / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [key for key in found if sha256(found[key]) != sha256(expected[key])] == []


def test_transformers_loads_block_fp8_and_leaves_out_head_and_routers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers loads quantized folders with accelerate")
    _, target = encoded("qwen3_moe", "fp8", tmp_path)
    config = read_hf_config(target)["quantization_config"]
    assert "lm_head" in config["modules_to_not_convert"]
    family = family_of(read_hf_config(target))
    source = open_checkpoint(target, family)
    # Without a GPU, which its FP8 kernels need, transformers dequantizes.
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj.weight"
    # transformers multiplies in bfloat16, this reader in float32: one rounding apart, 2^-8.
    torch.testing.assert_close(model.state_dict()[name], source.read(name), rtol=2**-7, atol=0)


def test_an_encoding_that_cannot_hold_the_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    families.save("qwen3_moe", tmp_path / "plain", torch.bfloat16)
    to_megatron.convert(tmp_path / "plain", tmp_path / "core", 1, CONSOLE)
    with pytest.raises(DataError, match="no tensor of this model can be MXFP4"):
        to_hf.convert(tmp_path / "core", tmp_path / "out", OutputFormat(encoding="mxfp4"), 1, CONSOLE)
    with pytest.raises(DataError, match="which INT4 in groups of 32 cannot hold"):
        to_hf.convert(tmp_path / "core", tmp_path / "out", OutputFormat(encoding="int4"), 1, CONSOLE)
    assert main(["convert", str(tmp_path / "core"), str(tmp_path / "out"), "--encoding=fp8", "--fp8"]) == 2
    assert "--encoding cannot be combined with --fp8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
