from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.errors import DataError
from megatron_rl.inference_server.model import ServedModel
from megatron_rl.inference_server.requests import BadRequest
from megatron_rl.weights.checksum import sha256
from tests.inference_server import tiny

EXPERT = "model.layers.1.mlp.experts.2.gate_proj.weight"


def loaded(folder: Path) -> ServedModel:
    return ServedModel(str(folder), "float32", "0")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_tensor_of_the_checkpoint_is_a_view_of_the_model(family: str, tied: bool, tmp_path: Path) -> None:
    model = loaded(tiny.save(family, tmp_path, tied))
    on_disk = load_file(tmp_path / "model.safetensors")
    assert model.tensors.keys() == on_disk.keys()
    assert all(torch.equal(model.tensors[name], tensor) for name, tensor in on_disk.items())
    storages = {p.untyped_storage().data_ptr() for p in model.model.parameters()}
    assert {t.untyped_storage().data_ptr() for t in model.tensors.values()} == storages
    assert sum(t.numel() for t in model.tensors.values()) == sum(p.numel() for p in model.model.parameters())


def test_an_experts_matrix_reaches_the_fused_parameter(moe_folder: Path) -> None:
    model = loaded(moe_folder)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    new = torch.randn(24, 32)
    model.begin_update()
    model.stage([(EXPERT, new)])
    assert model.end_update() == f"1 of {len(model.tensors)} tensors updated"
    for name, tensor in model.model.state_dict().items():
        if name == "model.layers.1.mlp.experts.gate_up_proj":
            before[name][2, :24] = new
        assert torch.equal(tensor, before[name]), name


def wrong_name(good: Tensor) -> tuple[str, Tensor]:
    return "model.layers.9.mlp.gate.weight", good


def wrong_shape(good: Tensor) -> tuple[str, Tensor]:
    return EXPERT, good.T


@pytest.mark.parametrize("wrong", [wrong_name, wrong_shape])
def test_a_wrong_tensor_leaves_all_weights_as_they_were(
    moe_folder: Path, wrong: Callable[[Tensor], tuple[str, Tensor]]
) -> None:
    model = loaded(moe_folder)
    before = model.checksums()
    model.begin_update()
    model.stage([("model.norm.weight", torch.zeros(32))])
    with pytest.raises(BadRequest, match=r"unknown tensor|this model's is \[24, 32\]"):
        model.stage([("lm_head.weight", torch.zeros(48, 32)), wrong(torch.zeros(24, 32))])
    with pytest.raises(BadRequest, match="after a tensor that was refused"):
        model.end_update()
    assert model.checksums() == before


def test_tensors_need_an_open_update(moe_folder: Path) -> None:
    with pytest.raises(BadRequest, match="between begin_weight_update and end_weight_update"):
        loaded(moe_folder).stage([("model.norm.weight", torch.zeros(32))])


def test_checksums_are_those_of_the_sender(moe_folder: Path) -> None:
    model = loaded(moe_folder)
    on_disk = load_file(moe_folder / "model.safetensors")
    assert model.checksums() == {name: sha256(tensor) for name, tensor in on_disk.items()}


def test_weights_are_read_from_a_folder_of_shards_or_a_file(moe_folder: Path, tmp_path: Path) -> None:
    tensors = {name: t + 1 for name, t in load_file(moe_folder / "model.safetensors").items()}
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:9]}, tmp_path / "model-1.safetensors")
    save_file({n: tensors[n] for n in names[9:]}, tmp_path / "model-2.safetensors")
    model = loaded(moe_folder)
    model.load(str(tmp_path))
    assert all(torch.equal(model.tensors[name], tensor) for name, tensor in tensors.items())
    model.load(str(moe_folder / "model.safetensors"))
    assert torch.equal(model.tensors[names[0]] + 1, tensors[names[0]])


def test_unreadable_files_are_refused(moe_folder: Path, tmp_path: Path) -> None:
    model = loaded(moe_folder)
    with pytest.raises(BadRequest, match="no safetensors"):
        model.load(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not this")
    with pytest.raises(BadRequest, match="is not a safetensors file"):
        model.load(str(tmp_path))


def test_a_folder_without_a_model_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json is missing"):
        loaded(tmp_path)
