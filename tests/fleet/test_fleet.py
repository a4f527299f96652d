"""The fleet against servers that lie, hang and break; none of them has a model."""

import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from megatron_rl.config.rollout import Sampling
from megatron_rl.data.types import Group, Prompt
from megatron_rl.errors import RolloutError
from megatron_rl.fleet import dispatch
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.members import Timeouts
from megatron_rl.weights.tensor import TensorTransport
from tests.fleet.fake import (
    FakeServer,
    Trick,
    aborted,
    foreign_token,
    garbage,
    nan_logprobs,
    once,
    serving,
    too_few_answers,
    too_few_tokens,
    too_long,
    wrong_version,
)

pytestmark = pytest.mark.processes

TIMEOUTS = Timeouts(
    request_timeout_seconds=5,
    control_timeout_seconds=1,
    pause_timeout_seconds=1,
    start_timeout_seconds=1,
    probe_seconds=0.05,
    probe_timeout_seconds=0.2,
    probe_failures=2,
    attempts=3,
)
PROMPTS = [Prompt(f"p{i}", (1, 2, i), "", "") for i in range(10)]
SAMPLING = Sampling(max_new_tokens=6)
WEIGHTS = [("t", torch.ones(3))]


@dataclass
class Size:
    """Sequences per request of the fleets that a test opens: one, or fixed batches of 8."""

    per_request: int = 8


SIZE = Size()


@pytest.fixture(autouse=True, params=[1, 8], ids=["one sequence", "fixed batches"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(SIZE, "per_request", request.param)
    return int(request.param)


def fleet_of(servers: Sequence[FakeServer], timeouts: Timeouts = TIMEOUTS) -> Fleet:
    urls, transport = [server.url for server in servers], TensorTransport(1 << 20)
    return Fleet.open(urls, transport, timeouts, sequences_per_server=16, sequences_per_request=SIZE.per_request)


def sampled(fleet: Fleet, step: int = 0, version: int | None = 0) -> list[Group]:
    return fleet.generate(PROMPTS, 4, SAMPLING, seed=(1, step), weight_version=version)


def expected() -> list[Group]:
    with serving(FakeServer()) as servers, fleet_of(servers) as fleet:
        return sampled(fleet)


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_groups_come_in_order_with_ids_and_seeds_of_their_own() -> None:
    groups = expected()
    assert [group.prompt for group in groups] == PROMPTS
    responses = [response for group in groups for response in group.responses]
    assert [(r.prompt_id, r.index) for r in responses] == [(p.id, i) for p in PROMPTS for i in range(4)]
    assert len({r.id for r in responses}) == 40
    assert len({tuple(r.output_ids) for r in responses}) > 25
    assert responses[0].weight_versions == ((0, 0, 6),)


def test_the_number_of_servers_changes_nothing() -> None:
    with serving(*(FakeServer() for _ in range(3))) as servers, fleet_of(servers) as fleet:
        assert sampled(fleet) == expected()
        assert all(server.rows for server in servers)
        assert sampled(fleet, step=1) != expected()


def test_the_same_prompt_twice_has_different_samples() -> None:
    with serving(FakeServer()) as servers, fleet_of(servers) as fleet:
        twice = fleet.generate([PROMPTS[0], PROMPTS[0]], 2, SAMPLING, seed=(1, 0))
    ids = [r.id for group in twice for r in group.responses]
    assert ids == ["1.0/p0/0", "1.0/p0/1", "1.0/p0#1/0", "1.0/p0#1/1"]
    assert twice[0].responses[0].output_ids.tolist() != twice[1].responses[0].output_ids.tolist()


@pytest.mark.parametrize(
    "trick", [garbage, too_few_tokens, foreign_token, nan_logprobs, wrong_version, too_few_answers]
)
def test_a_server_that_answers_wrongly_is_left_out(trick: Trick, caplog: pytest.LogCaptureFixture) -> None:
    liar, good = FakeServer(), FakeServer()
    liar.trick = trick
    with serving(liar, good), fleet_of([liar, good], replace(TIMEOUTS, probe_seconds=1.0)) as fleet:
        fleet.vocabulary = 97
        with caplog.at_level(logging.WARNING):
            assert sampled(fleet) == expected()
        assert fleet.urls == [good.url]
    assert [record.message.partition(":")[2].partition(" left")[0] for record in caplog.records] == [liar.url[5:]]


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_answers_with_an_error_is_left_out(status: int) -> None:
    broken, good = FakeServer(), FakeServer()
    broken.status = status
    with serving(broken, good), fleet_of([broken, good]) as fleet:
        assert sampled(fleet) == expected()


def test_a_server_that_hangs_is_found_by_its_health_long_before_the_timeout() -> None:
    stuck, good = FakeServer(), FakeServer()
    timeouts = replace(TIMEOUTS, request_timeout_seconds=600)
    with serving(stuck, good), fleet_of([stuck, good], timeouts) as fleet:
        stuck.hangs = True
        begin = time.monotonic()
        assert sampled(fleet, version=None) == expected()
        assert time.monotonic() - begin < 5
        stuck.hangs = False
        until(lambda: len(fleet.urls) == 2)


def test_a_healthy_server_may_take_longer_than_the_timeout_and_another_may_not(monkeypatch, size: int) -> None:
    wanted, limits = expected(), replace(TIMEOUTS, request_timeout_seconds=0.5)
    with serving(FakeServer()) as (slow,), fleet_of([slow], limits) as fleet:
        slow.delay_seconds = 1.0
        assert sampled(fleet) == wanted
        assert slow.calls["/generate"] == 40 // size
        monkeypatch.setattr(Client, "health_is_progress", False)
        with pytest.raises(RolloutError, match=r"made no progress for [^ ]+ s \(rollout.request_timeout_seconds"):
            sampled(fleet)
    with serving(FakeServer()) as (slow,), fleet_of([slow], replace(TIMEOUTS, request_limit_seconds=0.5)) as fleet:
        slow.delay_seconds = 30
        with pytest.raises(RolloutError, match=r"longer than 0.5 s \(rollout.request_limit_seconds"):
            sampled(fleet)


def test_a_slow_server_gets_less_to_do_and_loses_nothing() -> None:
    slow, fast = FakeServer(), FakeServer()
    slow.delay_seconds = 0.3
    with serving(slow, fast), fleet_of([slow, fast]) as fleet:
        assert sampled(fleet) == expected()
    assert len(slow.rows) < len(fast.rows)
    assert len(slow.rows) + len(fast.rows) == 40


def test_no_good_server_is_an_error_that_names_it_and_what_it_did(size: int) -> None:
    timeouts = replace(TIMEOUTS, start_timeout_seconds=20)  # each failure doubles the time until it is asked again
    with serving(FakeServer()) as (liar,), fleet_of([liar], timeouts) as fleet:
        liar.trick = nan_logprobs
        with pytest.raises(RolloutError, match=f"{liar.url}.*log-prob 0 is") as caught:
            sampled(fleet)
        assert f"gave up on {size} sequences after 3 attempts" in str(caught.value)


def test_a_fleet_without_servers_gives_up_and_says_why() -> None:
    with serving(FakeServer()) as (server,), fleet_of([server]) as fleet:
        server.hangs = True
        begin = time.monotonic()
        with pytest.raises(RolloutError, match=rf"no rollout server for 1 s: {server.url}: it failed 2 health checks"):
            sampled(fleet, version=None)
        assert time.monotonic() - begin < 4
        server.hangs = False


def test_all_servers_down_for_a_while_is_waited_out() -> None:
    with serving(FakeServer(), FakeServer()) as servers, fleet_of(servers) as fleet:
        for server in servers:
            server.hangs = True

        def recover() -> None:
            for server in servers:
                server.hangs = False

        timer = threading.Timer(0.8, recover)
        timer.start()
        assert sampled(fleet, version=None) == expected()
        timer.join()


def test_a_refused_request_is_an_error_at_once() -> None:
    with serving(FakeServer()) as (server,), fleet_of([server]) as fleet:
        server.status, server.trick = 400, too_long
        with pytest.raises(RolloutError, match="the prompt is too long"):
            sampled(fleet)
        assert fleet.urls == [server.url]


def test_aborted_samples_are_asked_for_again_and_nobody_is_blamed(size: int) -> None:
    with serving(FakeServer()) as (server,), fleet_of([server]) as fleet:
        server.trick = once(aborted)
        assert sampled(fleet) == expected()
        assert fleet.urls == [server.url]
        server.trick = aborted
        with pytest.raises(RolloutError, match=f"after 3 attempts.*{server.url} aborted 1 of {size} sequences"):
            sampled(fleet)


def test_a_server_that_hangs_does_not_hold_up_a_push() -> None:
    timeouts = replace(TIMEOUTS, control_timeout_seconds=60, pause_timeout_seconds=0.3, probe_seconds=60)
    with serving(FakeServer(), FakeServer()) as (stuck, good), fleet_of([stuck, good], timeouts) as fleet:
        stuck.hangs = True
        begin = time.monotonic()
        fleet.update(WEIGHTS, 1)
        assert time.monotonic() - begin < 3
        assert fleet.urls == [good.url]
        stuck.hangs = False


def test_a_server_that_missed_a_push_gets_it_before_it_gets_a_prompt() -> None:
    with serving(FakeServer(), FakeServer()) as (away, good), fleet_of([away, good]) as fleet:
        away.hangs = True
        report = fleet.update(WEIGHTS, 1)
        assert fleet.urls == [good.url]
        assert not report.failed  # it left before the push: a pause without an answer
        assert {r.weight_versions for g in sampled(fleet, version=1) for r in g.responses} == {((1, 0, 6),)}
        away.hangs = False
        until(lambda: len(fleet.urls) == 2)
        assert away.version == "1"
        assert away.calls["/flush_cache"] == good.calls["/flush_cache"] == 1
        assert away.calls["/update_weights_from_tensor"] >= 1
        sampled(fleet, version=1)
        assert away.rows


def test_a_server_that_was_restarted_with_old_weights_catches_up() -> None:
    with serving(FakeServer(), FakeServer()) as (first, second), fleet_of([first, second]) as fleet:
        fleet.update(WEIGHTS, 1)
        first.version = "0"  # as after a restart that nobody saw
        before = first.calls["/update_weights_from_tensor"]
        groups = sampled(fleet, version=1)
        assert {r.weight_versions for g in groups for r in g.responses} == {((1, 0, 6),)}
        until(lambda: first.version == "1" and len(fleet.urls) == 2)
        assert first.calls["/update_weights_from_tensor"] == before + 1


def test_weights_that_nobody_named_are_version_0_and_others_are_refused() -> None:
    with serving(FakeServer("default")) as (server,), fleet_of([server]) as fleet:
        sampled(fleet, version=0)
        assert server.version == "0"
    with (
        serving(FakeServer("7")) as (server,),
        fleet_of([server]) as fleet,
        pytest.raises(RolloutError, match=f"{re.escape(server.url)} has weights 7, not 0"),
    ):
        sampled(fleet, version=0)


def test_a_push_that_every_server_refuses_is_an_error() -> None:
    with serving(FakeServer()) as (server,), fleet_of([server]) as fleet:
        fleet.update(WEIGHTS, 1)
        with pytest.raises(ZeroDivisionError):
            fleet.update((("t", torch.ones(1) * (1 // 0)) for _ in range(1)), 2)
        assert sampled(fleet, version=1)  # a push that broke off left the fleet usable


def test_a_server_that_is_not_there_is_an_error_at_the_start() -> None:
    with pytest.raises(RolloutError, match=r"http://127\.0\.0\.1:9 has not become healthy within 1 s"):
        Fleet.open(["http://127.0.0.1:9"], TensorTransport(1 << 20), TIMEOUTS)
    assert not [thread for thread in threading.enumerate() if thread.name == "rollout fleet"]


def test_an_interrupted_wait_leaves_the_fleet_usable() -> None:
    class Stop(BaseException):
        pass

    with serving(FakeServer()) as (server,), fleet_of([server]) as fleet:
        server.delay_seconds = 0.5

        def interrupt(number: int, frame: object) -> None:
            raise Stop

        previous = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            with pytest.raises(Stop):
                sampled(fleet)
        finally:
            signal.signal(signal.SIGALRM, previous)
        server.delay_seconds = 0
        assert sampled(fleet) == expected()


def test_a_server_never_has_more_sequences_than_the_limit(size: int) -> None:
    with serving(FakeServer()) as (server,), fleet_of([server]) as fleet:
        server.delay_seconds = 0.02
        member = fleet.members[0]
        most: list[int] = []
        original = member.generate

        async def generate(*arguments: object) -> object:
            most.append(member.num_sequences + len(arguments[0]))  # type: ignore[arg-type]
            return await original(*arguments)  # type: ignore[arg-type]

        member.generate = generate  # type: ignore[method-assign]
        sampled(fleet)
        assert max(most) == 16
        assert server.calls["/generate"] == 40 // size


def test_one_sequence_that_fails_is_repeated_alone(size: int) -> None:
    with serving(FakeServer()) as (server,), fleet_of([server]) as fleet:
        server.trick = once(aborted)
        assert sampled(fleet) == expected()
        assert len(server.rows) == 40 + size


def test_a_fleet_that_waits_for_servers_says_so(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "_REPORT_SECONDS", 0.2)
    with serving(FakeServer()) as (server,), fleet_of([server]) as fleet:
        server.hangs = True
        with pytest.raises(RolloutError, match="no rollout server for 1 s"):
            sampled(fleet, version=None)
        server.hangs = False
    waits = [record.message for record in caplog.records if record.message.startswith("No rollout server for")]
    assert 1 <= len(waits) <= 5
    assert all(f"rollout.start_timeout_seconds): {server.url}: " in message for message in waits)
