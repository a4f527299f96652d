"""The fleet's own client and transports, against every engine under contract."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.fleet.client import Client
from megatron_rl.fleet.protocol import GenerationRequest, GenerationResult, RequestRefused, WrongVersion
from megatron_rl.weights.disk import DiskTransport
from megatron_rl.weights.tensor import TensorTransport
from megatron_rl.weights.transport import UpdateReport, WeightTransport
from tests.contract.conftest import Contract
from tests.inference_server import tiny

T = TypeVar("T")
BUCKET_BYTES = 1 << 13
REQUESTS = [
    GenerationRequest(f"client/{i}", (3, 1, 4, i), {"max_new_tokens": 4 + i, "temperature": 0.7, "sampling_seed": i})
    for i in range(5)
]


def call(server: Contract, ask: Callable[[Client], Awaitable[T]]) -> T:
    async def run() -> T:
        client = server.client()
        try:
            return await ask(client)
        finally:
            await client.close()

    return asyncio.run(run())


def generate(server: Contract, requests: list[GenerationRequest], version: str | None = None) -> list[GenerationResult]:
    return call(server, lambda client: client.generate(requests, version))


def checksums(server: Contract) -> tuple[str, Mapping[str, str]]:
    return call(server, lambda client: client.checksums())


def reset(server: Contract) -> None:
    """Give the server the checkpoint's weights again."""
    call(server, lambda client: client.update_from_disk(str(server.model)))
    call(server, lambda client: client.set_version("default"))


def push(
    server: Contract, transport: WeightTransport, tensors: dict[str, Tensor], version: int
) -> tuple[UpdateReport, str]:
    async def send(client: Client) -> tuple[UpdateReport, str]:
        await client.pause("retract")
        report = await transport.push([client], tensors.items(), version)
        await client.flush()
        await client.resume()
        return report, await client.version()

    return call(server, send)


@pytest.fixture(params=["tensor", "disk"])
def transport(request: pytest.FixtureRequest, server: Contract, tmp_path: Path) -> Iterator[WeightTransport]:
    """A transport; the server has the checkpoint's weights again after the test."""
    if (server.engine, request.param) == ("vllm", "tensor"):
        pytest.skip("vLLM reads weights from a folder only")
    yield (
        TensorTransport(BUCKET_BYTES)
        if request.param == "tensor"
        else DiskTransport(BUCKET_BYTES, tmp_path, server.model)
    )
    reset(server)


def test_samples_come_in_order_with_logprobs_and_versions(server: Contract) -> None:
    call(server, lambda client: client.set_version("7"))
    samples = generate(server, REQUESTS, version="7")
    assert [sample.rid for sample in samples] == [request.rid for request in REQUESTS]
    assert [len(sample.logprobs) for sample in samples] == [4, 5, 6, 7, 8]
    assert [sample.weight_versions for sample in samples] == [(("7", 0, n),) for n in (4, 5, 6, 7, 8)]
    assert all(sample.text.split() == [f"w{i}" for i in sample.output_ids] for sample in samples)
    with pytest.raises(WrongVersion):
        generate(server, REQUESTS, version="8")


def test_scores_are_the_models_own(server: Contract) -> None:
    sequences = [tuple(ids) for ids in tiny.prompts_of(2, 9, 30)]
    scored = generate(server, [GenerationRequest(str(ids), ids, {"max_new_tokens": 0}) for ids in sequences])
    model = server.build()
    for ids, sample in zip(sequences, scored, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
        assert sample.input_logprobs == pytest.approx(expected, abs=1e-5)


def test_a_prompt_that_is_too_long_is_refused(server: Contract) -> None:
    with pytest.raises(RequestRefused, match=r"longer than the model's context|maximum (context|model) length"):
        generate(server, [GenerationRequest("long", (1,) * 300, {"max_new_tokens": 3})])


def test_a_push_arrives_whole_and_gives_its_version(server: Contract, transport: WeightTransport) -> None:
    model = server.build()
    tensors = {name: tensor * 1.25 for name, tensor in load_file(server.model / "model.safetensors").items()}
    report, version = push(server, transport, tensors, 3)
    assert (report.failed, report.num_tensors, version) == ({}, len(tensors), "3")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
        logprobs = model(torch.tensor([[3, 1, 4, 1, 5]])).logits[0].log_softmax(-1)
    [scored] = generate(server, [GenerationRequest("after", (3, 1, 4, 1, 5), {"max_new_tokens": 0})], version="3")
    expected = [float(logprobs[i, token]) for i, token in enumerate((1, 4, 1, 5))]
    assert scored.input_logprobs == pytest.approx(expected, abs=1e-5)


def test_both_transports_leave_the_same_checksums(server: Contract, tmp_path: Path) -> None:
    if server.engine == "vllm":
        pytest.skip("vLLM reads weights from a folder only")
    tensors = {name: tensor * 0.75 for name, tensor in load_file(server.model / "model.safetensors").items()}
    found = []
    for version, transport in enumerate(
        [TensorTransport(BUCKET_BYTES), DiskTransport(BUCKET_BYTES, tmp_path, server.model)]
    ):
        assert not push(server, transport, tensors, version)[0].failed
        found.append(checksums(server))
    assert found[0] == found[1]
    reset(server)
    assert checksums(server) != found[0]


def test_equal_seeds_are_equal_samples(server: Contract) -> None:
    if not server.repeats:
        pytest.skip("SGLang's torch_native attention does not promise it")
    assert generate(server, REQUESTS) == generate(server, REQUESTS)


def test_drawn_tokens_have_the_models_own_logprobs_at_the_temperature(server: Contract) -> None:
    model = server.build()
    for request, sample in zip(REQUESTS, generate(server, REQUESTS), strict=True):
        ids = [*request.input_ids, *sample.output_ids]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, len(request.input_ids) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(sample.output_ids)[:, None])[:, 0]
        assert sample.logprobs == pytest.approx(expected.tolist(), abs=1e-5)  # float32 on both sides


def test_a_stop_token_is_the_last_of_its_response(server: Contract) -> None:
    [free] = generate(server, [GenerationRequest("free", (3, 1, 4), {"max_new_tokens": 12, "temperature": 0})])
    stop = int(free.output_ids[5])
    params = {"max_new_tokens": 12, "temperature": 0, "stop_token_ids": [stop]}
    [sample] = generate(server, [GenerationRequest("stopped", (3, 1, 4), params)])
    assert sample.finish_reason == "stop"
    ids = free.output_ids.tolist()
    assert sample.output_ids.tolist() == ids[: ids.index(stop) + 1]


def test_a_pause_holds_and_an_abort_ends(server: Contract) -> None:
    long = [GenerationRequest("long", (3, 1, 4), {"max_new_tokens": 240, "ignore_eos": True})]

    async def scenario(client: Client) -> tuple[bool, GenerationResult, GenerationResult]:
        await client.pause("in_place")
        request = asyncio.ensure_future(client.generate([replace(long[0], rid="held")]))
        await asyncio.sleep(0.5)
        held = not request.done()
        await client.resume()
        [whole] = await request
        request = asyncio.ensure_future(client.generate([replace(long[0], rid="cut")]))
        await asyncio.sleep(server.head_start_seconds)
        await client.abort(None)
        [cut] = await request
        return held, whole, cut

    held, whole, cut = call(server, scenario)
    assert held
    assert (whole.finish_reason, len(whole.output_ids)) == ("length", 240)
    assert cut.finish_reason == "abort"
    assert len(cut.output_ids) < 240
