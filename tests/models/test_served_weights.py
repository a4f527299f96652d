"""What a run pushes follows from the folder that its servers load; servers that hold another form are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.config.schema import Run
from megatron_rl.errors import DataError
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.quantization_settings import named_encoding, settings_of
from megatron_rl.models.served_weights import ServedWeights
from tests.policy import families

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def served(folder: Path, settings: object = None, **rollout: Any) -> ServedWeights:
    """Return the form of the pushes of a run whose servers load a folder with this quantization."""
    families.save("qwen3_moe", folder, torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    encoding = rollout.pop("encoding", "auto")
    model, weights = {"path": str(folder), "dtype": "bfloat16"}, {"encoding": encoding}
    return ServedWeights.of(Run.model_validate({"model": model, "weights": weights, "rollout": rollout}))


@pytest.fixture(autouse=True)
def _no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only config.json decides here."""
    monkeypatch.setattr("megatron_rl.models.served_weights.holds_hf_files", lambda folder: False)


def test_the_folder_decides_and_none_switches_it_off(tmp_path: Path) -> None:
    assert served(tmp_path / "a").encoding is None
    assert served(tmp_path / "b", FP8, encoding="none").encoding is None
    assert served(tmp_path / "c", FP8).label == "FP8 in blocks of 128 x 128 with float32 scales"
    assert served(tmp_path / "d", encoding="fp8_channel").label == "FP8 with one scale per output channel"


def test_a_named_encoding_leaves_out_what_the_folder_leaves_out(tmp_path: Path) -> None:
    without = served(tmp_path, {**FP8, "modules_to_not_convert": ["model.layers.0"]}, encoding="fp8_ue8m0")
    assert without.encoding is not None
    assert without.label.endswith("ue8m0 scales")
    assert without.encoding.names
    assert not any(name.startswith("model.layers.0.") for name in without.encoding.names)


def test_other_tensors_get_the_servers_type(tmp_path: Path) -> None:
    form = served(tmp_path, FP8, dtype="float32")
    sent = dict(form.encoded([("model.norm.weight", torch.ones(4, dtype=torch.bfloat16))]))
    assert sent["model.norm.weight"].dtype == torch.float32


def test_a_server_is_compared_by_format_and_by_the_tensors_that_are_quantized(tmp_path: Path) -> None:
    form = served(tmp_path, FP8)
    assert form.problem("fp8", FP8) is None
    assert form.problem("fp8", None) is None
    assert form.problem("unknown", None) is None  # its tensors have scales
    for method, settings, words in [
        ("", None, "holds weights that are not quantized, but the run would push FP8 in blocks of 128 x 128"),
        ("fp8", {**FP8, "weight_block_size": [64, 64]}, "holds weights as FP8 in blocks of 64 x 64"),
        ("fp8", {**FP8, "scale_fmt": "ue8m0"}, "holds weights as FP8 in blocks of 128 x 128 with ue8m0 scales"),
        ("fp8", {**FP8, "modules_to_not_convert": ["self_attn.q_proj"]}, "quantizes other tensors"),
        ("compressed-tensors", settings_of("fp8_channel", []), "holds weights as FP8 with one scale per output"),
        ("awq", {"quant_method": "awq"}, "holds weights as awq"),
        ("gptq", None, "holds weights as gptq"),
    ]:
        problem = form.problem(method, settings)
        assert problem is not None, method
        assert words in problem
        assert "rollout.model_path" in problem or "weights.encoding" in problem


def test_an_encoding_that_cannot_hold_the_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tensor of this model can be MXFP4"):
        served(tmp_path / "a", encoding="mxfp4")
    with pytest.raises(DataError, match="which INT4 in groups of 32 cannot hold"):
        served(tmp_path / "b", encoding="int4")


def test_named_settings_declare_the_tensors_that_they_quantize(tmp_path: Path) -> None:
    hf = read_hf_config(families.save("qwen3_moe", tmp_path))
    named = named_encoding("fp8", hf, family_of(hf))
    assert "lm_head" in named.settings["modules_to_not_convert"]
    assert any(module.endswith("mlp.gate") for module in named.settings["modules_to_not_convert"])
    assert not any("mlp.gate.weight" in name or "lm_head" in name for name in named.encoding.names)
