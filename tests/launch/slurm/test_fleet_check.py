"""Every server of a fleet is checked before a run uses it; a dead or wrong server is named."""

import re
from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.errors import RolloutError
from megatron_rl.fleet.registry import UNCHECKED, Registry
from megatron_rl.launch.slurm.fleet_check import ServerProbe, check_fleet, compare_weights
from tests.fleet.fake import FakeServer, garbage, serving

pytestmark = pytest.mark.processes

DEMO = Path(__file__).parents[3] / "configs" / "demo.toml"


def run_with(*urls: str, **settings: object) -> Run:
    words = [f"rollout.urls={list(urls)!r}".replace("'", '"'), "rollout.start_timeout_seconds=1"]
    return load(
        Run, [str(DEMO)], [*words, *(f"{key.replace('__', '.')}={value}" for key, value in settings.items())]
    ).run


def test_equal_servers_pass_and_are_timed(capsys):
    with serving(FakeServer(), FakeServer()) as (one, other):
        assert check_fleet(run_with(one.url, other.url)) == 0

    output = capsys.readouterr().out
    assert "preflight:" not in output
    assert all(f"{server.url}" in output for server in (one, other))
    assert output.count(" ms") == 2


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda server: setattr(server, "trick", garbage), "cannot be used: http://.* is not JSON"),
        (lambda server: setattr(server, "status", 500), "cannot be used: http://.* answered 500"),
        (lambda server: setattr(server, "version", "7"), "has weights of version '7', the others have '0'"),
        (lambda server: setattr(server, "logprob", -3.0), r"its log-probs differ by 2\.\d+ nats from the others'"),
    ],
)
def test_a_faulty_server_is_named(capsys, break_it, words, tmp_path):
    with serving(FakeServer(), FakeServer(), FakeServer()) as servers:
        break_it(servers[1])
        for number, server in enumerate(servers):
            Registry(tmp_path).add(number, server.url)
        assert check_fleet(run_with(rollout__registry=tmp_path, rollout__servers=3)) == 1

    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("preflight:")]
    assert line.startswith(f"preflight: {servers[1].url} ")
    assert re.search(words, line)


def test_an_unreachable_server_is_named(capsys):
    with serving(FakeServer()) as (server,):
        assert check_fleet(run_with(server.url, "http://127.0.0.1:9")) == 1

    assert "preflight: http://127.0.0.1:9 cannot be used: the server" in capsys.readouterr().out


def test_weights_of_running_servers_may_differ_because_the_run_pushes_its_own():
    with serving(FakeServer("3"), FakeServer("0")) as (one, other):
        assert check_fleet(run_with(one.url, other.url)) == 0


def test_servers_of_the_job_that_do_not_register_are_named_by_number(tmp_path):
    (tmp_path / "server_1.json").write_text('{"url": "http://127.0.0.1:9"}')
    settings = {"rollout__registry": tmp_path, "rollout__servers": 3}

    with pytest.raises(RolloutError, match=r"1 of 3 servers .* within 1 s, 0, 2 have not"):
        check_fleet(run_with(**settings))


def test_the_trainer_waits_until_all_servers_pass(tmp_path):
    registry = Registry(tmp_path)
    (tmp_path / UNCHECKED).touch()
    with serving(FakeServer(), FakeServer()) as servers:
        for number, server in enumerate(servers):
            registry.add(number, server.url)
        run = run_with(rollout__registry=tmp_path, rollout__servers=2)
        servers[0].status = 500
        assert check_fleet(run) == 1
        with pytest.raises(RolloutError, match="none have not, and the preflight has not passed"):
            registry.wait(2, 0)

        servers[0].status = 200
        assert check_fleet(run) == 0

    assert registry.wait(2, 0) == [server.url for server in servers]


def test_of_two_different_servers_both_are_named():
    probes = [ServerProbe("a", logprobs=(-1.0, -2.0)), ServerProbe("b", logprobs=(-3.0, -4.0))]

    assert [bool(probe.problem) for probe in compare_weights(probes)] == [True, True]
