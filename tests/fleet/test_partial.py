"""Responses in the making while weights are pushed, on real embedded servers: each token keeps what made it."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.config.rollout import Sampling
from megatron_rl.data.types import Group, Prompt
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.members import Timeouts
from megatron_rl.fleet.partial import join_results
from megatron_rl.fleet.process import embedded_server
from megatron_rl.fleet.protocol import GenerationResult
from megatron_rl.weights.tensor import TensorTransport
from tests.inference_server.tiny import prompts_of

pytestmark = pytest.mark.processes

TIMEOUTS = Timeouts(60, 20, 20, 90, 0.1, 0.5, 5)
PROMPTS = [Prompt(f"p{i}", tuple(ids), "", "") for i, ids in enumerate(prompts_of(*range(3, 11)))]
LONG = Sampling(max_new_tokens=200)


def words(ids: object) -> str:
    assert isinstance(ids, list)
    return " ".join(map(str, ids))


@pytest.fixture(params=["continue", "resubmit"], scope="module")
def fleet(
    request: pytest.FixtureRequest, moe_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    options = ["--weight-version", "0", "--batching", "continuous"]
    logs = tmp_path_factory.mktemp("logs")
    servers = [embedded_server(str(moe_folder), logs / f"{i}.log", options) for i in range(2)]
    decode = words if request.param == "resubmit" else None
    with Fleet.open(servers, TensorTransport(1 << 16), TIMEOUTS, sequences_per_request=4, decode=decode) as fleet:
        yield fleet


def newest(fleet: Fleet) -> int:
    return int(fleet.sync.version or 0)


def weights(folder: Path, factor: float) -> dict[str, Tensor]:
    return {name: tensor * factor for name, tensor in load_file(folder / "model.safetensors").items()}


def sampled_through_a_push(fleet: Fleet, new: dict[str, Tensor]) -> list[Group]:
    """Return groups during whose making these weights were pushed."""
    version = newest(fleet) + 1
    pending = fleet.submit(PROMPTS, 2, LONG, (0, version), range(version - 1, version + 1))
    deadline = time.monotonic() + 30
    while not all(member.num_sequences for member in fleet.members):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.1)
    assert not fleet.update(new.items(), version).failed
    return [group for _, chunk in pending for group in chunk.result(60)]


def test_a_response_goes_on_after_a_push_and_every_token_has_its_own_weights(fleet: Fleet, moe_folder: Path) -> None:
    old, new = weights(moe_folder, 1.0), weights(moe_folder, 1.3)
    before = newest(fleet)
    groups = sampled_through_a_push(fleet, new)
    assert [group.prompt for group in groups] == PROMPTS
    responses = [response for group in groups for response in group.responses]
    assert [len(r.output_ids) for r in responses] == [len(r.logprobs) for r in responses] == [200] * 16
    mixed = [r for r in responses if len(r.weight_versions) == 2]
    assert len(mixed) >= 4  # whoever was being made when the push came
    assert all(
        [v for v, _, _ in r.weight_versions] == [before, before + 1] and r.weight_versions[-1][2] == 200 for r in mixed
    )
    assert len({tuple(r.output_ids) for r in responses}) == 16
    prompts = {prompt.id: prompt.input_ids for prompt in PROMPTS}
    sequences = [(*prompts[r.prompt_id], *r.output_ids.tolist()) for r in mixed]
    scores = {before + 1: fleet.score(sequences, before + 1)}
    fleet.update(old.items(), before + 2)
    scores[before] = fleet.score(sequences, before + 2)
    for i, r in enumerate(mixed):
        for version, start, end in r.weight_versions:
            first = len(prompts[r.prompt_id]) - 1
            ours = scores[version][i][first + start : first + end]
            assert ours == pytest.approx(r.logprobs[start:end], abs=1e-4)
    if fleet.decode is not None:
        assert all(r.text == words(r.output_ids.tolist()) for r in mixed)


def test_two_pushes_make_three_pieces_and_none_counts_as_a_failed_attempt(fleet: Fleet, moe_folder: Path) -> None:
    before = newest(fleet)
    pending = fleet.submit(PROMPTS, 2, LONG, (0, 9), range(before, before + 7))
    for version in range(before + 1, before + 7):
        time.sleep(0.05)
        fleet.update(weights(moe_folder, 1 + version / 50).items(), version)
    responses = [r for _, chunk in pending for group in chunk.result(60) for r in group.responses]
    assert [len(r.logprobs) for r in responses] == [200] * 16
    assert max(len(r.weight_versions) for r in responses) >= 3
    for r in responses:
        assert [v for v, _, _ in r.weight_versions] == sorted({v for v, _, _ in r.weight_versions})


def piece(ids: tuple[int, ...], version: str, finish: str, text: str = "") -> GenerationResult:
    versions = ((version, 0, len(ids)),) if ids else ()
    columns = np.array(ids, np.int32), -np.array(ids, np.float32), np.empty(0)
    return GenerationResult("r", *columns, text, finish, versions)


def test_pieces_join_token_by_token() -> None:
    whole = join_results(piece((1, 2), "3", "abort", "a"), piece((4,), "3", "abort", "b"))
    assert (whole.output_ids.tolist(), whole.weight_versions, whole.text) == ([1, 2, 4], (("3", 0, 3),), "ab")
    whole = join_results(whole, piece((5, 6), "4", "stop"), words)
    assert whole.weight_versions == (("3", 0, 3), ("4", 3, 5))
    assert (whole.logprobs.tolist(), whole.finish_reason, whole.text) == ([-1, -2, -4, -5, -6], "stop", "1 2 4 5")
    assert join_results(piece((), "3", "abort"), piece((7,), "4", "length")).weight_versions == (("4", 0, 1),)


def test_experts_of_a_piece_are_those_of_its_first_reading() -> None:
    head = replace(piece((1, 2), "3", "abort"), routes=np.full((3, 1, 1), 0))  # two tokens of prompt, one of two
    tail = replace(piece((4,), "4", "stop"), routes=np.full((1, 1, 1), 1))
    whole = join_results(head, tail)
    assert whole.routes is not None
    assert whole.routes.flatten().tolist() == [0, 0, 0, 1]
    assert join_results(piece((1, 2), "3", "abort"), tail).routes is None
