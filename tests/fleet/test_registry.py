"""Servers that register during a run join the fleet; those that are not registered any more leave it."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.registry import Registry
from megatron_rl.weights.tensor import TensorTransport
from tests.fleet.fake import FakeServer, serving
from tests.fleet.test_fleet import TIMEOUTS, WEIGHTS, expected, sampled, until

pytestmark = pytest.mark.processes


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path)


@contextmanager
def fleet_of(registry: Registry, servers: tuple[FakeServer, ...], *, keep: bool = True) -> Iterator[Fleet]:
    """Open a fleet of these registered servers."""
    for number, server in enumerate(servers):
        registry.add(number, server.url)
    timeouts = replace(TIMEOUTS, start_timeout_seconds=5, attempts=4)
    transport = TensorTransport(1 << 20)
    with Fleet.open(registry.urls(), transport, timeouts, registry=registry, keep_weights=keep) as fleet:
        yield fleet


def versions_of(fleet: Fleet, version: int) -> set[tuple[tuple[int, int, int], ...]]:
    return {r.weight_versions for group in sampled(fleet, version=version) for r in group.responses}


def test_a_server_that_registers_gets_the_weights_before_its_first_prompt(registry, caplog) -> None:
    caplog.set_level(logging.INFO)
    with serving(FakeServer(), FakeServer("1")) as (old, new), fleet_of(registry, (old,)) as fleet:
        fleet.update(WEIGHTS, 1)
        registry.add(1, new.url)  # its version has the right name, but may be another run's
        until(lambda: len(fleet.urls) == 2)
        assert new.calls["/update_weights_from_tensor"] == 1
        assert versions_of(fleet, 1) == {((1, 0, 6),)}
        assert new.rows
        joined = [r.getMessage() for r in caplog.records if f"{new.url} joined" in r.getMessage()]
        assert joined == [f"Server {new.url} joined the fleet with weights version 1"]


def test_a_joiner_changes_no_sample(registry) -> None:
    with serving(FakeServer(), FakeServer(), FakeServer()) as (old, *new), fleet_of(registry, (old,)) as fleet:
        old.delay_seconds = 0.02
        threads = [threading.Thread(target=registry.add, args=(i + 1, server.url)) for i, server in enumerate(new)]
        for thread in threads:
            thread.start()
        assert sampled(fleet) == expected()
        until(lambda: len(fleet.urls) == 3)
        for thread in threads:
            thread.join()
        assert sampled(fleet) == expected()


def test_without_a_copy_of_the_weights_a_joiner_waits_for_the_next_push(registry) -> None:
    with serving(FakeServer(), FakeServer()) as (old, new), fleet_of(registry, (old,), keep=False) as fleet:
        fleet.update(WEIGHTS, 1)
        registry.add(1, new.url)
        until(lambda: any(member.waits_for_push for member in fleet.members))
        assert fleet.urls == [old.url]
        assert versions_of(fleet, 1) == {((1, 0, 6),)}
        assert not new.rows
        assert not fleet.update(WEIGHTS, 2).failed
        assert set(fleet.urls) == {old.url, new.url}
        assert new.version == "2"


def test_a_joiner_during_a_push_has_the_pushed_weights(registry) -> None:
    with serving(FakeServer(), FakeServer()) as (old, new), fleet_of(registry, (old,)) as fleet:

        def tensors() -> Iterator[tuple[str, Tensor]]:
            registry.add(1, new.url)
            until(lambda: new.calls["/model_info"] > 0)  # its check waits for the end of the push
            yield from WEIGHTS

        fleet.update(tensors(), 1)
        assert not new.rows
        until(lambda: len(fleet.urls) == 2)
        assert new.version == "1"


def test_before_the_first_push_a_joiner_needs_the_same_checksums(registry, monkeypatch) -> None:
    with serving(FakeServer(), FakeServer(), FakeServer()) as (old, same, other), fleet_of(registry, (old,)) as fleet:
        other.checksum = "another model"
        registry.add(1, same.url)
        registry.add(2, other.url)
        until(lambda: len(fleet.urls) == 2 and fleet.members[2].waits_for_push)
        assert set(fleet.urls) == {old.url, same.url}
        sampled(fleet)
        assert not other.rows
        other.checksum = old.checksum
        fleet.update(WEIGHTS, 1)
        assert len(fleet.urls) == 3


def test_requests_of_a_server_that_leaves_are_sent_to_others(registry, caplog) -> None:
    with serving(FakeServer(), FakeServer()) as (stays, leaves), fleet_of(registry, (stays, leaves)) as fleet:
        leaves.delay_seconds = 60
        thread = threading.Thread(target=lambda: (until(lambda: leaves.calls["/generate"] > 0), registry.remove(1)))
        thread.start()
        assert sampled(fleet) == expected()
        thread.join()
        assert fleet.urls == [stays.url]
        assert len(fleet.members) == 1
        assert f"Server {leaves.url} left the fleet: it is not registered any more" in caplog.text
        leaves.delay_seconds = 0
        leaves.version = "7"
        fleet.update(WEIGHTS, 1)
        registry.add(1, leaves.url)  # with old weights
        until(lambda: len(fleet.urls) == 2)
        assert leaves.version == "1"


def test_a_server_that_leaves_during_a_push_does_not_end_it(registry) -> None:
    with serving(FakeServer(), FakeServer()) as (stays, leaves), fleet_of(registry, (stays, leaves)) as fleet:

        def tensors() -> Iterator[tuple[str, Tensor]]:
            registry.remove(1)
            until(lambda: len(fleet.members) == 1)
            yield from WEIGHTS

        fleet.update(tensors(), 1)
        assert fleet.urls == [stays.url]
        assert versions_of(fleet, 1) == {((1, 0, 6),)}


def test_a_fleet_whose_servers_all_left_ends_with_a_message(registry) -> None:
    with serving(FakeServer()) as (server,), fleet_of(registry, (server,)) as fleet:
        registry.remove(0)
        until(lambda: not fleet.members)
        with pytest.raises(RolloutError, match="no rollout server for 5 s: none is registered"):
            sampled(fleet)


def test_a_folder_that_cannot_be_read_changes_nothing(registry, tmp_path) -> None:
    with serving(FakeServer()) as (server,), fleet_of(registry, (server,)) as fleet:
        (tmp_path / "server_1.json").write_text('{"url": ')
        assert registry.changed_urls() is None
        assert sampled(fleet) == expected()
        (tmp_path / "server_1.json").unlink()
        tmp_path.rename(tmp_path.with_name("away"))
        assert registry.changed_urls() is None
        assert sampled(fleet) == expected()
        assert fleet.urls == [server.url]
        tmp_path.with_name("away").rename(tmp_path)


def test_addresses_may_be_lines_of_a_file(tmp_path) -> None:
    path = tmp_path / "servers.txt"
    with pytest.raises(RolloutError, match="0 of 1 servers"):
        Registry(path).wait(1, 0)
    path.write_text("# the first rack\nhttp://10.0.0.1:30000/\n\n  http://10.0.0.2:30000\nhttp://10.0.0.1:30000\n")
    assert Registry(path).wait(2, 0) == ["http://10.0.0.1:30000", "http://10.0.0.2:30000"]


def test_servers_are_in_order_of_their_numbers(registry) -> None:
    for number in (10, 9, 2, 0):
        registry.add(number, f"http://10.0.0.{number}:1")
    assert [url[7:-2] for url in registry.urls()] == ["10.0.0.0", "10.0.0.2", "10.0.0.9", "10.0.0.10"]
