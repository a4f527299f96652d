"""Responses of several turns on a real embedded server: every token stays what it was, and keeps its log-prob."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.config.load import load
from megatron_rl.config.rollout import Sampling
from megatron_rl.config.schema import Run
from megatron_rl.data.types import Group, Prompt
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.members import Timeouts
from megatron_rl.fleet.process import embedded_server
from megatron_rl.fleet.turns import MultiTurn
from megatron_rl.rollout.collect import collect
from megatron_rl.tasks.base import Verdict
from megatron_rl.weights.tensor import TensorTransport
from tests.contract.test_routes import SHAPE, chosen_by_transformers
from tests.inference_server.tiny import prompts_of

pytestmark = pytest.mark.processes

PROMPTS = [Prompt(f"p{i}", tuple(ids), "", "") for i, ids in enumerate(prompts_of(3, 7, 5, 4))]
SAMPLING = Sampling(max_new_tokens=40, stop_token_ids=tuple(range(8)), temperature=0.7)
RUN = load(Run, [], ["model.path=x"]).run


class Words:
    """A token is a word."""

    def encode(self, text: str, *, add_special_tokens: bool, **options: bool) -> list[int]:
        return [int(word.removeprefix("w")) for word in text.split()]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join(f"w{token}" for token in token_ids)


def decoded(output_ids: np.ndarray) -> str:
    return Words().decode(output_ids.tolist())


def inserted(message: str, last_token: int) -> tuple[int, ...] | None:
    """Return the tokens of a message; a turn that ends with the token 7 ends its response."""
    return None if last_token == 7 else tuple(Words().encode(f"w47 {message}", add_special_tokens=False))


class Echo:
    """Says the length of what was said, twice; the second time as ids. Ends after the third turn."""

    def __init__(self) -> None:
        self.turns: list[str] = []

    def reset(self, prompt: Prompt) -> None:
        self.prompt = prompt

    def step(self, turn: str) -> str | tuple[int, ...] | None:
        self.turns.append(turn)
        count = len(turn.split())
        return {1: f"w{count} w9", 2: (9, 10 + len(self.prompt.input_ids)), 3: None}[len(self.turns)]


class Rude:
    """Raises, or hangs, depending on the prompt."""

    def reset(self, prompt: Prompt) -> None:
        self.prompt = prompt
        if prompt.id == "p1":
            raise ValueError("no")

    def step(self, turn: str) -> str | None:
        if self.prompt.id == "p2":
            time.sleep(5)
        if self.prompt.id == "p3":
            raise RuntimeError("not this one")
        return None


@pytest.fixture(scope="module")
def fleet(moe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    log = tmp_path_factory.mktemp("logs") / "0.log"
    server = embedded_server(str(moe_folder), log, ["--weight-version", "0"])
    with Fleet.open(
        [server], TensorTransport(1 << 16), Timeouts(60, 20, 60, 90, 0.1, 0.5, 5), sequences_per_request=4
    ) as fleet:
        yield fleet


def sampled(fleet: Fleet, make: type = Echo, most: int = 8, seconds: float = 30, sampling: Sampling = SAMPLING):
    fleet.multi_turn = MultiTurn(make, decoded, inserted, most, seconds)
    return fleet.generate(PROMPTS, 4, sampling, (0, 0), 0)


def scores(folder: Path, group: Group, temperature: float) -> Iterator[tuple[int, int, float]]:
    """Yield response, output position and log-prob of every output token, from transformers on the whole sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for number, response in enumerate(group.responses):
        ids = torch.tensor([[*group.prompt.input_ids, *response.output_ids]])
        with torch.no_grad():
            logprobs = (model(ids).logits[0] / temperature).log_softmax(-1)
        first = len(group.prompt.input_ids)
        for at, token in enumerate(response.output_ids):
            yield number, at, float(logprobs[first + at - 1, token])


def test_turns_are_what_the_environment_saw_and_said_token_by_token(fleet):
    words = Words()
    several = 0
    for group in sampled(fleet):
        for response in group.responses:
            several += len(response.observed) == 2
            ids, begun = response.output_ids.tolist(), 0
            for turn, (start, end) in enumerate(response.observed, start=1):
                said = words.decode(ids[begun:start], skip_special_tokens=True)
                count, length = len(said.split()), len(group.prompt.input_ids)
                assert ids[start:end] == ([47, count, 9] if turn == 1 else [9, 10 + length])
                assert ids[start - 1] in SAMPLING.stop_token_ids
                assert set(response.logprobs[start:end]) == {0.0}
                begun = end
            assert len(ids) == len(response.logprobs) <= SAMPLING.max_new_tokens
            assert response.answer_text == words.decode(ids[begun:], skip_special_tokens=True) or not response.observed
            assert len(response.turns) in (0, 2 * len(response.observed) + 1)
            for text, (start, end) in zip(response.turns[1::2], response.observed, strict=True):
                assert text == words.decode(ids[start:end])
            assert sum(response.sampled) == len(ids) - sum(end - start for start, end in response.observed)
    assert several > 4


def test_log_probs_of_sampled_tokens_are_those_of_the_whole_sequence(fleet, moe_folder):
    for group in sampled(fleet):
        for number, at, logprob in scores(moe_folder, group, SAMPLING.temperature):
            response = group.responses[number]
            if response.sampled[at]:
                assert math.isclose(response.logprobs[at], logprob, abs_tol=1e-4)  # float32, other kernels


def test_experts_of_several_turns_are_those_of_the_whole_sequence(fleet, moe_folder):
    fleet.multi_turn = MultiTurn(Echo, decoded, inserted, 8, 30)
    several = 0
    for group in fleet.generate(PROMPTS, 2, SAMPLING, (0, 1), 0, SHAPE):
        for response in group.responses:
            several += len(response.observed) == 2
            truth = chosen_by_transformers(moe_folder, [*group.prompt.input_ids, *response.output_ids])[:-1]
            assert response.routes is not None
            assert np.array_equal(np.sort(response.routes.numpy(), axis=-1), truth)
    assert several > 0


def test_only_sampled_tokens_are_trained_on(fleet):
    groups = sampled(fleet)
    batch = collect(groups, [[Verdict(float(i), True) for i in range(4)]] * len(groups), RUN)
    at = 0
    for group in groups:
        for response in group.responses:
            at += len(group.prompt.input_ids)
            span = slice(at, at + len(response.output_ids))
            assert batch["input_ids_T"][span].tolist() == list(response.output_ids)
            assert batch["loss_mask_T"][span].tolist() == list(response.sampled)
            assert (batch["weight_versions_T"][span] >= 0).tolist() == list(response.sampled)
            at += len(response.output_ids)
    assert int((~batch["loss_mask_T"]).sum()) > sum(4 * len(g.prompt.input_ids) for g in groups)


def test_the_same_seeds_give_the_same_turns(fleet):
    assert sampled(fleet) == sampled(fleet)


def test_a_response_that_wants_more_turns_or_has_no_room_is_truncated(fleet):
    for response in (r for group in sampled(fleet, most=1) for r in group.responses):
        assert response.finish_reason == ("stop" if response.output_ids[-1] == 7 else "length")
        assert response.observed == ()
    tight = SAMPLING.model_copy(update={"max_new_tokens": 6})
    for response in (r for group in sampled(fleet, sampling=tight) for r in group.responses):
        assert len(response.output_ids) <= 6
        assert not response.observed or response.observed[-1][1] < 6


def test_an_environment_that_raises_or_hangs_costs_its_responses_only(fleet, caplog):
    groups = sampled(fleet, make=Rude, seconds=1.0)
    ended = {group.prompt.id: {r.finish_reason for r in group.responses} - {"length"} for group in groups}
    assert ended["p0"] <= {"stop"}
    assert ended["p1"] == {"failed"}
    assert ended["p2"] <= {"failed"}
    assert ended["p3"] <= {"failed"}
    assert "An environment raised RuntimeError: not this one" in caplog.text
    assert "longer than 1 s" in caplog.text
