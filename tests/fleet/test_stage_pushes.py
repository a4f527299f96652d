"""Pushes by stages from an open fleet: servers generate meanwhile, and join."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.fleet.client import Client
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.rollout.stage_push import StageClients
from megatron_rl.weights.stage_sender import StageSender
from megatron_rl.weights.stages import StageTransport
from tests.fleet.test_faults import PROMPTS, SAMPLING
from tests.fleet.test_joining import TIMEOUTS, Site, checksums, sampled, wait_for

pytestmark = pytest.mark.processes


@pytest.fixture
def site(moe_folder: Path, tmp_path: Path) -> Iterator[Site]:
    with closing(Site(moe_folder, tmp_path)) as site:
        yield site


def transport() -> StageTransport:
    sender = StageSender(StageClients(Client, 30.0), "gloo", torch.device("cpu"), 30.0)
    return StageTransport(1 << 13, sender)


def weights(model: Path, number: int) -> dict[str, Tensor]:
    return {name: tensor * (1 + number / 2) for name, tensor in load_file(model / "model.safetensors").items()}


def test_servers_generate_until_all_weights_have_arrived(site: Site, moe_folder: Path) -> None:
    urls = [site.start().url, site.start().url]
    with Fleet.open(urls, transport(), TIMEOUTS) as fleet:
        fleet.sync.pause_at = "end"
        fleet.update(weights(moe_folder, 1).items(), 1)
        asked = fleet.submit(PROMPTS, 4, SAMPLING, (7, 1), range(1, 3))

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for index, item in enumerate(weights(moe_folder, 2).items()):
                if index == 3:  # the rest of the weights follows when all responses are complete
                    groups = [group for _, batch in asked for group in batch.result(120)]
                    versions = [part[0] for group in groups for r in group.responses for part in r.weight_versions]
                    assert versions == [1] * 4 * len(PROMPTS)
                yield item

        assert fleet.update(tensors(), 2).failed == {}
        assert len(sampled(fleet, 2)) == len(PROMPTS)
        assert {version for version, _ in checksums(*urls)} == {"2"}


def test_a_server_that_starts_during_a_push_gets_the_next_one(site: Site, moe_folder: Path) -> None:
    site.start()
    with Fleet.open(site.registry.urls(), transport(), TIMEOUTS, registry=site.registry, keep_weights=False) as fleet:

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for index, item in enumerate(weights(moe_folder, 1).items()):
                if index == 3:
                    site.start("1")  # the version that is being sent, with other weights
                yield item

        assert fleet.update(tensors(), 1).failed == {}
        version = 1
        while len(fleet.urls) < 2 and version < 400:
            version += 1
            assert fleet.update(weights(moe_folder, version % 7).items(), version).failed == {}
            assert len(sampled(fleet, version)) == len(PROMPTS)
        wait_for(fleet, 2)
        assert len({str(entry) for entry in checksums(*fleet.urls)}) == 1
        assert fleet.update(weights(moe_folder, version % 7).items(), version + 1).num_bytes == 0  # nothing changed
        assert {version for version, _ in checksums(*fleet.urls)} == {str(version + 1)}
