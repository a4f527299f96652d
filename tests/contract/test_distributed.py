"""Weights through a torch.distributed group, against a server of either engine."""

import asyncio
import json
import time

import torch
from torch import Tensor

from megatron_rl.fleet.client import Client
from megatron_rl.weights.distributed import DistributedTransport
from tests.contract.conftest import Contract
from tests.contract.test_weights import checksums, logprobs, original

__all__ = ["original"]

TRANSPORT = DistributedTransport(1 << 12, "gloo", torch.device("cpu"), timeout_seconds=20)


def test_buckets_that_are_broadcast_become_the_weights(server: Contract, original: dict[str, Tensor]) -> None:
    before, sums = logprobs(server), checksums(server)
    for factor, version in ((1.5, 1), (1.0, 2)):
        tensors = [(name, tensor * factor) for name, tensor in sorted(original.items())]

        async def push(tensors: list[tuple[str, Tensor]] = tensors, version: int = version) -> None:
            client = Client(server.url)
            report = await TRANSPORT.push([client], tensors, version)
            await client.close()
            assert not report.failed, report.failed

        asyncio.run(push())
        assert server.json("/model_info", method="GET")["weight_version"] == str(version)
        if version == 1:
            assert logprobs(server) != before
            assert all(sums[name] != value for name, value in checksums(server).items())
    server.ask("/flush_cache", {})
    assert max(abs(a - b) for a, b in zip(logprobs(server), before, strict=True)) < 1e-6  # the same weights again
    assert checksums(server) == sums


def test_a_bucket_outside_of_an_update_is_refused_and_hangs_nobody(server: Contract) -> None:
    async def refused() -> tuple[object, float]:
        client = Client(server.url)
        push = await TRANSPORT.begin([client], 1)
        await client.end_update()
        begun = time.monotonic()
        await push.send([("model.norm.weight", torch.ones(32))])
        seconds = time.monotonic() - begun
        await client.close()
        return push.failed[server.url], seconds

    why, seconds = asyncio.run(refused())
    assert "begin_weight_update" in str(why)
    assert seconds < 10  # not the timeout, which is 20 s


def test_a_bucket_for_a_group_that_is_not_there_is_refused(server: Contract) -> None:
    server.json("/begin_weight_update", {})
    body = {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[32]], "group_name": "nobody's"}
    status, text = server.ask("/update_weights_from_distributed", body)
    assert (status, json.loads(text)["success"]) == (400, False)
    assert "nobody's" in json.loads(text)["message"]
    server.ask("/end_weight_update", {})
