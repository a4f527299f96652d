"""Damaged and malicious checkpoints: one clear error, no crash, no partial result."""

import json
import pickle
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

from megatron_rl.convert import to_hf, to_megatron
from megatron_rl.convert.to_hf import OutputFormat
from megatron_rl.errors import MegatronRLError
from megatron_rl.models.hf_mapping.rules import Family
from megatron_rl.models.hf_reader import INDEX, HFCheckpointReader, read_headers
from megatron_rl.models.safetensor_files import read_header
from megatron_rl.models.torch_dist import METADATA, read_metadata, read_region
from tests.policy import families

CONSOLE = Console(quiet=True)
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save("qwen2_moe", tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "megatron"
    to_megatron.convert(source, target, 1, CONSOLE)
    return target


def read_all(path: Path) -> None:
    for extent in read_header(path).values():
        extent.read()


@FUZZ
@given(st.binary(max_size=200), st.integers(0, 1 << 64))
@example(b"[" * 100_000, 100_000)
@example(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}', 74)
@example(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}', 55)
@example(b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}0000', 57)
@example(b'{"a":1,"a":2}', 13)
@example(b"\xff\xfe{}", 4)
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((length % (1 << 64)).to_bytes(8, "little") + content)

    with suppress(MegatronRLError):
        read_all(path)


@FUZZ
@given(st.data())
def test_a_file_with_changed_or_lost_bytes_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:length])

    try:
        read_all(path)
    except MegatronRLError:
        return
    assert length == len(content)  # a truncated file is never read as complete


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", 7, None, "absent.safetensors"]
)
def test_an_index_cannot_leave_its_folder(source: Path, tmp_path: Path, file: object) -> None:
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))

    with pytest.raises(MegatronRLError, match=r"index\.json"):
        read_headers(tmp_path / "hf")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": []}', "{}", '{"weight_map": {"a": {}}}', "\x00"])
def test_an_index_that_is_none_is_refused(source: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / INDEX).write_text(text)

    with pytest.raises(MegatronRLError, match=r"index\.json"):
        read_headers(tmp_path / "hf")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '"text"',
        "nul",
        '{"model_type": "qwen2_moe", "hidden_size": "x"}',
        '{"model_type": "llama", '
        '"hidden_size": "x", "num_attention_heads": 0, "num_hidden_layers": -1, "intermediate_size": null}',
    ],
)
def test_a_config_that_is_none_is_refused(source: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(text)

    with pytest.raises(MegatronRLError, match=r"config\.json"):
        to_megatron.convert(tmp_path / "hf", tmp_path / "megatron", 1, CONSOLE)


def test_a_file_cut_while_it_is_read_leaves_no_target(source: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(source, tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    check = to_megatron._check_dtypes

    def cut(reader: HFCheckpointReader, family: Family) -> None:
        check(reader, family)
        path.write_bytes(path.read_bytes()[:-10_000])

    monkeypatch.setattr(to_megatron, "_check_dtypes", cut)

    with pytest.raises(MegatronRLError, match=r"model\.safetensors ends at byte"):
        to_megatron.convert(tmp_path / "hf", tmp_path / "megatron", 1, CONSOLE)

    assert not (tmp_path / "megatron").exists()


class Harmful:
    def __reduce__(self):
        return print, ("a pickle ran code",)


@pytest.mark.parametrize("harmful", [Harmful(), {"a": Harmful()}])
def test_a_pickle_that_would_run_code_is_refused(converted, tmp_path: Path, capsys, harmful: object) -> None:
    shutil.copytree(converted, tmp_path / "megatron")
    (tmp_path / "megatron" / METADATA).write_bytes(pickle.dumps(harmful))

    with pytest.raises(MegatronRLError, match=r"builtins\.print, which does not belong"):
        read_metadata(tmp_path / "megatron")

    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("what", ["common.pt", "a tensor"])
def test_pickles_in_data_files_are_not_run(converted: Path, tmp_path: Path, capsys, what: str) -> None:
    shutil.copytree(converted, tmp_path / "megatron")
    if what == "common.pt":
        torch.save(Harmful(), tmp_path / "megatron" / what)
    else:
        path = tmp_path / "megatron" / "__1_0.distcp"
        torch.save(Harmful(), tmp_path / "harm.pt")
        harm = (tmp_path / "harm.pt").read_bytes()
        path.write_bytes(harm + path.read_bytes()[len(harm) :])

    if what == "common.pt":  # never opened
        to_hf.convert(tmp_path / "megatron", tmp_path / "again", OutputFormat(), 1, CONSOLE)
    else:
        with pytest.raises(MegatronRLError, match="cannot be read"):
            to_hf.convert(tmp_path / "megatron", tmp_path / "again", OutputFormat(), 1, CONSOLE)

    assert "ran code" not in capsys.readouterr().out


@FUZZ
@given(st.integers(0, 1 << 32))
def test_damaged_metadata_is_read_or_refused(converted: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    content = bytearray((converted / METADATA).read_bytes())
    for _ in range(chance.randint(1, 4)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    del content[len(content) - chance.choice([0, 0, 1, chance.randrange(len(content))]) :]
    folder = tmp_path / "damaged"
    if not folder.exists():
        shutil.copytree(converted, folder)
    (folder / METADATA).write_bytes(content)

    with suppress(MegatronRLError):
        tensors = read_metadata(folder)
        for name in sorted(tensors)[:3]:
            read_region(folder, name, tensors[name], [0] * len(tensors[name].shape), tensors[name].shape)


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_cut_data_files_are_refused(converted: Path, tmp_path: Path, where: float) -> None:
    shutil.copytree(converted, tmp_path / "megatron")
    path = tmp_path / "megatron" / "__2_0.distcp"
    content = path.read_bytes()
    path.write_bytes(content[: int(where * len(content))])

    with pytest.raises(MegatronRLError, match=r"__2_0\.distcp at bytes \d+ to \d+; the file has \d+"):
        to_hf.convert(tmp_path / "megatron", tmp_path / "again", OutputFormat(), 1, CONSOLE)

    assert not (tmp_path / "again").exists()


def test_a_tensor_in_two_files_is_refused(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "hf")
    save_file({"model.norm.weight": torch.zeros(64)}, tmp_path / "hf" / "more.safetensors")

    with pytest.raises(MegatronRLError, match=r"model\.norm\.weight is in model\.safetensors and again in more"):
        read_headers(tmp_path / "hf")


def test_fused_and_split_experts_together_are_an_error(tmp_path: Path) -> None:
    source = families.save("mixtral", tmp_path / "hf", fused=True)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    save_file(tensors | {name: torch.zeros(96, 64)}, source / "model.safetensors")

    with pytest.raises(MegatronRLError, match=r"w1\.weight is in the checkpoint, and again as a part of"):
        to_megatron.convert(source, tmp_path / "megatron", 1, CONSOLE)
