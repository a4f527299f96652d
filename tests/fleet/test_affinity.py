"""Dispatch: the least busy server, or the one that has the beginning of the prompt in its cache."""

import pytest

from megatron_rl.fleet import affinity
from megatron_rl.fleet.affinity import PREFIX_TOKENS, PrefixAffinity
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.members import Member
from megatron_rl.fleet.protocol import GenerationRequest


def requests(*tokens: int, count: int = 4) -> list[GenerationRequest]:
    return [GenerationRequest(f"r{i}", tokens, {"max_new_tokens": 1}) for i in range(count)]


@pytest.fixture
def members() -> list[Member]:
    return [Member(Client(f"http://127.0.0.1:{port}"), ready=True) for port in (1, 2, 3)]


def test_a_new_prompt_goes_to_the_least_busy_server(members):
    members[0].num_sequences, members[1].num_sequences, members[2].num_sequences = 5, 2, 9

    assert PrefixAffinity().choose(members, requests(1, 2), 0) is members[1]


def test_a_longer_prompt_with_the_same_beginning_follows_the_first(members):
    chooser, prefix = PrefixAffinity(), tuple(range(PREFIX_TOKENS))
    first = chooser.choose(members, requests(*prefix), 0)
    first.num_sequences = 4

    assert chooser.choose(members, requests(*prefix, 7, 8), 0) is first
    assert chooser.choose(members, requests(9, 9), 0) is not first


def test_a_server_that_is_far_behind_or_full_or_gone_is_not_waited_for(members):
    chooser = PrefixAffinity()
    first = chooser.choose(members, requests(1), 0)
    first.num_sequences = 5

    assert chooser.choose(members, requests(1), 0) is not first
    assert chooser.choose([m for m in members if m is not first], requests(1), 0) is not first


def test_a_push_empties_caches_and_memory(members):
    chooser = PrefixAffinity()
    first = chooser.choose(members, requests(1), 0)
    first.num_sequences = 1

    assert chooser.choose(members, requests(1), 1) is not first


def test_only_so_many_prefixes_are_remembered(members, monkeypatch):
    monkeypatch.setattr(affinity, "MAX_PREFIXES", 2)
    chooser = PrefixAffinity()
    first = chooser.choose(members, requests(1), 0)
    first.num_sequences = 1
    for token in (2, 3):
        chooser.choose(members, requests(token), 0)

    assert chooser.choose(members, requests(1), 0) is not first
