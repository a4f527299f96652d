"""sglang-router in front of the fleet, with servers that break: no sample is lost, whoever sends it on."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.data.routes import RouteShape
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.members import Timeouts
from megatron_rl.fleet.router import router_process
from megatron_rl.weights.tensor import TensorTransport
from tests.fleet.fake import FakeServer, serving
from tests.fleet.test_fleet import PROMPTS, SAMPLING, WEIGHTS, expected, sampled, until

ROOT = Path(__file__).parents[2]
PROGRAM = shutil.which("sglang-router") or str(ROOT / ".venv-router" / "bin" / "sglang-router")
TIMEOUTS = Timeouts(
    request_timeout_seconds=4,
    control_timeout_seconds=3,
    start_timeout_seconds=30,
    probe_seconds=0.1,
    probe_timeout_seconds=2,
    probe_failures=2,
    attempts=4,
)
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not Path(PROGRAM).exists(), reason="no sglang-router: tools/sglang-router makes it"),
]


@pytest.fixture
def servers() -> Iterator[tuple[FakeServer, ...]]:
    with serving(FakeServer(), FakeServer()) as two:
        yield two


@pytest.fixture
def fleet(servers: tuple[FakeServer, ...], tmp_path: Path) -> Iterator[Fleet]:
    transport = TensorTransport(1 << 20)
    urls, router = [server.url for server in servers], router_process(PROGRAM, tmp_path / "router.log")
    with Fleet.open(urls, transport, TIMEOUTS, sequences_per_request=8, router=router) as fleet:
        yield fleet
    assert fleet.router is not None
    assert fleet.router.member.process is not None
    assert fleet.router.member.process.exit_status is not None


def through_router(fleet: Fleet) -> bool:
    assert fleet.router is not None
    return fleet.router.member.ready


def test_plain_generation_goes_through_the_router(servers: tuple[FakeServer, ...], fleet: Fleet) -> None:
    assert sampled(fleet) == expected()
    assert sampled(fleet) == expected()
    assert through_router(fleet)
    # The router asks each server what it is when it is told of it; nobody else asks for that.
    assert all(server.calls["/server_info"] + server.calls["/get_server_info"] for server in servers)


def test_a_push_reaches_every_server_and_then_the_router_goes_on(servers: tuple[FakeServer, ...], fleet: Fleet) -> None:
    assert not fleet.update(WEIGHTS, 1).failed
    groups = sampled(fleet, step=1, version=1)
    assert {r.weight_versions for group in groups for r in group.responses} == {((1, 0, 6),)}
    assert [server.version for server in servers] == ["1", "1"]
    assert through_router(fleet)


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_answers_with_an_error_costs_no_sample(
    servers: tuple[FakeServer, ...], fleet: Fleet, status: int
) -> None:
    servers[0].status = status
    assert sampled(fleet) == expected()


def test_a_server_that_breaks_connections_costs_no_sample_and_comes_back(
    servers: tuple[FakeServer, ...], fleet: Fleet
) -> None:
    servers[0].breaks = True
    assert sampled(fleet) == expected()
    servers[0].breaks = False
    until(lambda: len(fleet.urls) == 2 and through_router(fleet), 15)
    assert sampled(fleet) == expected()


def test_a_server_that_hangs_costs_no_sample_and_comes_back(servers: tuple[FakeServer, ...], fleet: Fleet) -> None:
    servers[0].hangs = True
    begun = time.monotonic()
    assert sampled(fleet) == expected()
    assert time.monotonic() - begun < 3 * TIMEOUTS.request_timeout_seconds
    servers[0].hangs = False
    until(lambda: len(fleet.urls) == 2 and through_router(fleet), 15)
    assert sampled(fleet) == expected()


def test_a_router_that_is_killed_costs_no_sample_and_is_started_again(fleet: Fleet) -> None:
    assert fleet.router is not None
    assert fleet.router.member.process is not None
    first = fleet.router.member.process.pid
    fleet.router.member.process._process.kill()  # type: ignore[union-attr]
    assert sampled(fleet) == expected()
    until(lambda: through_router(fleet) and fleet.router.member.process.pid != first, 20)  # type: ignore[union-attr]
    assert sampled(fleet) == expected()


def test_what_the_router_would_drop_does_not_go_through_it(servers: tuple[FakeServer, ...], fleet: Fleet) -> None:
    heard: list[int] = []
    assert fleet.router is not None
    original = fleet.router.member.generate

    async def listen(*arguments: object) -> object:
        heard.append(1)
        return await original(*arguments)  # type: ignore[arg-type]

    fleet.router.member.generate = listen  # type: ignore[method-assign]
    fleet.generate(PROMPTS, 4, SAMPLING, (1, 0), 0, RouteShape((0,), 1, 4, 2))
    assert not heard
    fleet.generate(PROMPTS, 4, SAMPLING, (1, 0), 0)
    assert heard
