"""The fleet's own client and carriers, against every engine under contract."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.rollout.client import Client
from megatron_rl.rollout.protocol import RequestRefused, Sample, SampleRequest, WrongVersion
from megatron_rl.weights.disk import DiskCarrier
from megatron_rl.weights.protocol import Carrier, PushReport
from megatron_rl.weights.tensor import TensorCarrier
from tests.contract.conftest import Contract
from tests.rollout import tiny

BUCKET_BYTES = 1 << 13
REQUESTS = [
    SampleRequest(f"client/{i}", (3, 1, 4, i), {"max_new_tokens": 4 + i, "temperature": 0.7, "sampling_seed": i})
    for i in range(5)
]


def generate(server: Contract, requests: list[SampleRequest], version: str | None = None) -> list[Sample]:
    async def ask() -> list[Sample]:
        client = Client(server.url)
        try:
            return await client.generate(requests, version)
        finally:
            await client.close()

    return asyncio.run(ask())


def push(server: Contract, carrier: Carrier, tensors: dict[str, Tensor], version: int) -> tuple[PushReport, str]:
    async def send() -> tuple[PushReport, str]:
        client = Client(server.url)
        try:
            await client.pause("retract")
            report = await carrier.push([client], tensors.items(), version)
            await client.flush()
            await client.resume()
            return report, await client.version()
        finally:
            await client.close()

    return asyncio.run(send())


@pytest.fixture(params=["tensor", "disk"])
def carrier(request: pytest.FixtureRequest, server: Contract, tmp_path: Path) -> Iterator[Carrier]:
    """A carrier; the server has the checkpoint's weights again after the test."""
    yield (
        TensorCarrier(BUCKET_BYTES) if request.param == "tensor" else DiskCarrier(BUCKET_BYTES, tmp_path, server.model)
    )
    server.json("/update_weights_from_disk", {"model_path": str(server.model), "weight_version": "default"})


def test_samples_come_in_order_with_logprobs_and_versions(server: Contract) -> None:
    server.json("/update_weight_version", {"new_version": "7", "abort_all_requests": False})
    samples = generate(server, REQUESTS, version="7")
    assert [sample.rid for sample in samples] == [request.rid for request in REQUESTS]
    assert [len(sample.logprobs) for sample in samples] == [4, 5, 6, 7, 8]
    assert [sample.weight_versions for sample in samples] == [(("7", 0, n),) for n in (4, 5, 6, 7, 8)]
    assert all(sample.text.split() == [f"w{i}" for i in sample.output_ids] for sample in samples)
    with pytest.raises(WrongVersion):
        generate(server, REQUESTS, version="8")


def test_scores_are_the_models_own(server: Contract) -> None:
    sequences = [tuple(ids) for ids in tiny.prompts_of(2, 9, 30)]
    scored = generate(server, [SampleRequest(str(ids), ids, {"max_new_tokens": 0}) for ids in sequences])
    model = tiny.build("qwen3_moe")
    for ids, sample in zip(sequences, scored, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
        assert sample.input_logprobs == pytest.approx(expected, abs=1e-5)


def test_a_prompt_that_is_too_long_is_refused(server: Contract) -> None:
    with pytest.raises(RequestRefused, match="longer than the model's context"):
        generate(server, [SampleRequest("long", (1,) * 300, {"max_new_tokens": 3})])


def test_a_push_arrives_whole_and_gives_its_version(server: Contract, carrier: Carrier) -> None:
    model = tiny.build("qwen3_moe")
    tensors = {name: tensor * 1.25 for name, tensor in load_file(server.model / "model.safetensors").items()}
    report, version = push(server, carrier, tensors, 3)
    assert (report.failed, report.num_tensors, version) == ({}, len(tensors), "3")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
        logprobs = model(torch.tensor([[3, 1, 4, 1, 5]])).logits[0].log_softmax(-1)
    [scored] = generate(server, [SampleRequest("after", (3, 1, 4, 1, 5), {"max_new_tokens": 0})], version="3")
    expected = [float(logprobs[i, token]) for i, token in enumerate((1, 4, 1, 5))]
    assert scored.input_logprobs == pytest.approx(expected, abs=1e-5)


def test_both_carriers_leave_the_same_checksums(server: Contract, tmp_path: Path) -> None:
    tensors = {name: tensor * 0.75 for name, tensor in load_file(server.model / "model.safetensors").items()}
    found = []
    for version, carrier in enumerate([TensorCarrier(BUCKET_BYTES), DiskCarrier(BUCKET_BYTES, tmp_path, server.model)]):
        assert not push(server, carrier, tensors, version)[0].failed
        found.append(server.json("/weights_checker", {"action": "checksum"})["ranks"])
    assert found[0] == found[1]
    server.json("/update_weights_from_disk", {"model_path": str(server.model), "weight_version": "default"})
    assert server.json("/weights_checker", {"action": "checksum"})["ranks"] != found[0]


def test_equal_seeds_are_equal_samples(server: Contract) -> None:
    if not server.repeats:
        pytest.skip("SGLang's torch_native attention does not promise it")
    assert generate(server, REQUESTS) == generate(server, REQUESTS)
