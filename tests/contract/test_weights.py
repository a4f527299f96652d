import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.weights.tensor import encode
from tests.contract.conftest import LONG, Contract
from tests.contract.test_control import during

GREEDY = {
    "input_ids": [3, 1, 4, 1, 5],
    "sampling_params": {"max_new_tokens": 8, "temperature": 0},
    "return_logprob": True,
}


def logprobs(server: Contract) -> list[float]:
    return [entry[0] for entry in server.json("/generate", GREEDY)["meta_info"]["output_token_logprobs"]]


def checksums(server: Contract) -> dict[str, str]:
    [rank] = server.json("/weights_checker", {"action": "checksum"})["ranks"]
    return rank["checksums"]


def push(server: Contract, tensors: dict[str, Tensor]) -> tuple[int, str]:
    body = {"serialized_named_tensors": [encode(list(tensors.items()))], "flush_cache": True}
    return server.ask("/update_weights_from_tensor", body)


@pytest.fixture
def original(server: Contract) -> Iterator[dict[str, Tensor]]:
    """The checkpoint's tensors; the server has them again after the test."""
    yield load_file(server.model / "model.safetensors")
    server.json("/update_weights_from_disk", {"model_path": str(server.model), "weight_version": "default"})


def test_tensors_between_begin_and_end_become_the_weights(server: Contract, original: dict[str, Tensor]) -> None:
    before, sums = logprobs(server), checksums(server)
    server.json("/begin_weight_update", {})
    names = sorted(original)
    for part in (names[:10], names[10:]):
        status, text = push(server, {name: original[name] * 1.5 for name in part})
        assert (status, json.loads(text)["success"]) == (200, True)
    server.json("/end_weight_update", {})
    assert logprobs(server) != before
    assert all(sums[name] != value for name, value in checksums(server).items())
    server.json("/begin_weight_update", {})
    push(server, original)
    server.json("/end_weight_update", {})
    assert logprobs(server) == pytest.approx(before, abs=1e-6)
    assert checksums(server) == sums


def test_tensors_without_begin_are_refused(server: Contract, original: dict[str, Tensor]) -> None:
    status, text = push(server, original)
    assert (status, json.loads(text)["success"]) == (400, False)
    assert "begin_weight_update" in json.loads(text)["message"]


@pytest.mark.parametrize("wrong", ["name", "shape", "payload"])
def test_a_wrong_tensor_is_refused_and_the_old_weights_stay(
    server: Contract, original: dict[str, Tensor], wrong: str
) -> None:
    if server.is_sglang:
        pytest.skip("SGLang skips names that it does not know, and ends itself at a wrong shape or payload")
    sums = checksums(server)
    server.json("/begin_weight_update", {})
    assert push(server, {"model.norm.weight": torch.zeros(32)})[0] == 200
    if wrong == "payload":
        status, text = server.ask("/update_weights_from_tensor", {"serialized_named_tensors": ["AAAA"]})
    else:
        name = "model.nothing.weight" if wrong == "name" else "lm_head.weight"
        status, text = push(server, {name: torch.zeros(3, 3)})
    assert (status, json.loads(text)["success"]) == (400, False)
    server.ask("/end_weight_update", {})
    assert checksums(server) == sums


def test_weights_come_from_a_folder_with_their_version(
    server: Contract, original: dict[str, Tensor], tmp_path: Path
) -> None:
    before = logprobs(server)
    save_file({name: t * 1.5 for name, t in original.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((server.model / "config.json").read_bytes())
    server.json("/update_weights_from_disk", {"model_path": str(tmp_path), "weight_version": "12"})
    assert logprobs(server) != before
    assert server.json("/model_info", method="GET")["weight_version"] == "12"
    assert server.json("/generate", GREEDY)["meta_info"]["weight_versions"] == [{"version": "12", "start": 0, "end": 8}]


def test_a_folder_that_is_not_there_is_refused_and_the_server_lives_on(server: Contract, tmp_path: Path) -> None:
    before = logprobs(server)
    status, text = server.ask("/update_weights_from_disk", {"model_path": str(tmp_path / "nothing")})
    assert (status, json.loads(text)["success"]) == (400, False)
    assert logprobs(server) == pytest.approx(before, abs=1e-6)


def test_a_version_in_the_middle_of_a_request_is_recorded(server: Contract, original: dict[str, Tensor]) -> None:
    server.json("/update_weight_version", {"new_version": "1", "abort_all_requests": False})

    async def update() -> None:
        await server.ask_async("/pause_generation", {"mode": "retract"})
        body = {"model_path": str(server.model), "weight_version": "2", "flush_cache": True}
        assert (await server.ask_async("/update_weights_from_disk", body))[0] == 200
        await server.ask_async("/continue_generation", {})

    meta = asyncio.run(during(server, LONG, update))["meta_info"]
    first, second = meta["weight_versions"]
    assert (first["version"], second["version"]) == ("1", "2")
    assert 0 == first["start"] < first["end"] == second["start"] < second["end"] == 240
    assert meta["weight_version"] == "2"


def test_naming_a_version_aborts_requests_unless_told_not_to(server: Contract, original: dict[str, Tensor]) -> None:
    name = "/update_weight_version"
    answer = asyncio.run(during(server, LONG, lambda: server.ask_async(name, {"new_version": "5"})))
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert server.json("/model_info", method="GET")["weight_version"] == "5"
