"""An engine's record of experts on its way into a batch: nothing wrong passes, what is missing is counted."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_rl.data.routes import RouteShape, encode_routes
from megatron_rl.data.types import Batch, Response
from megatron_rl.distributed.replicas import Replicas
from megatron_rl.errors import RolloutError
from megatron_rl.fleet.protocol import BadAnswer, GenerationRequest, generate_body, parse_answer, parse_results
from megatron_rl.observability.routing_statistics import RoutingCounts, routing_counts
from megatron_rl.rollout.routes import route_columns
from tests.fleet.test_protocol import answer
from tests.minibatches import alone

SHAPE = RouteShape(layers=(0, 2), all_layers=3, experts=4, per_token=2)
REQUEST = GenerationRequest("r1", (5, 6, 7), {"max_new_tokens": 4}, SHAPE)


def record(tokens: int) -> np.ndarray:
    """Return [tokens, 3, 2]; the middle layer has no experts, and zeros."""
    first = np.arange(tokens * 3).reshape(tokens, 3) % 4
    routes = np.stack([first, (first + 1) % 4], axis=-1)
    routes[:, 1] = 0
    return routes


def test_a_record_is_read_for_all_tokens_but_the_last() -> None:
    sent = record(5)
    [sample] = parse_results([answer(routed_experts=encode_routes(sent))], [REQUEST], "here")
    assert sample.routes is not None
    assert sample.routes.dtype == np.uint8
    assert np.array_equal(sample.routes, sent[:, [0, 2]])
    assert generate_body([REQUEST])["return_routed_experts"] is True


def test_without_a_record_the_sample_stands() -> None:
    [sample] = parse_results([answer()], [REQUEST], "here")
    assert sample.routes is None
    assert "return_routed_experts" not in generate_body([GenerationRequest("r", (1,), {"max_new_tokens": 4})])


@pytest.mark.parametrize("spaces", [False, True])
def test_bytes_are_read_like_values_and_later_turns_without_the_known_tokens(spaces: bool) -> None:
    sent, pair = record(5), ((",", ":"), (", ", ": "))[spaces]
    both = [replace(REQUEST, rid="r1"), replace(REQUEST, rid="r1", routes_start=2)]
    answers = [answer(routed_experts=encode_routes(sent)), answer(routed_experts=encode_routes(sent[2:]))]
    answers[1]["text"] = 'a "routed_experts": "@0", of two'
    first, later = parse_answer(json.dumps(answers, separators=pair).encode(), both, "here")
    assert first.routes is not None
    assert later.routes is not None
    assert np.array_equal(first.routes, sent[:, [0, 2]])
    assert np.array_equal(later.routes, sent[2:, [0, 2]])
    assert later.text == answers[1]["text"]
    assert generate_body(both)["routed_experts_start_len"] == [0, 2]
    for wrong in ("@0", "@1", "@"):
        raw = json.dumps([answer(routed_experts=wrong)]).encode()
        with pytest.raises(BadAnswer, match="routed_experts of 5 tokens"):
            parse_answer(raw, [REQUEST], "here")


def test_a_long_record_is_read_in_parts() -> None:
    shape = RouteShape((1, 2, 3), 4, 300, 5)
    sent = np.argsort(np.random.default_rng(0).random((7001, 4, 300)), axis=-1)[..., :5]
    read = shape.decode(encode_routes(sent), 7001)
    assert read.dtype == np.int16
    assert np.array_equal(read, sent[:, 1:])
    sent[6999, 3, 1] = sent[6999, 3, 4]
    with pytest.raises(ValueError, match="the same expert twice"):
        shape.decode(encode_routes(sent), 7001)
    sent[6999, 3, 1] = -1
    with pytest.raises(ValueError, match="experts -1 to 299"):
        shape.decode(encode_routes(sent), 7001)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (encode_routes(record(6)), r"36 numbers, expected 5 tokens \* 3 layers \* 2 experts = 30"),
        (encode_routes(record(5)[:, :2]), "20 numbers, expected"),
        (encode_routes(np.where(record(5) == 3, 4, record(5))), "experts 0 to 4, the model's are 0 to 3"),
        (encode_routes(np.zeros((5, 3, 2))), "the same expert twice"),
        ("not base64!", "not base64"),
        (base64.b64encode(b"abc").decode(), "0 numbers"),
        (7, "expected a str"),
    ],
)
def test_a_wrong_record_is_no_answer(wrong: object, message: str) -> None:
    with pytest.raises(BadAnswer, match=message):
        parse_results([answer(routed_experts=wrong)], [REQUEST], "here")


def response(tokens: int, *, known: bool) -> Response:
    routes = torch.from_numpy(SHAPE.decode(encode_routes(record(tokens + 1)), tokens + 1)) if known else None
    return Response(
        "r", "p", 0, np.array((1,) * tokens), np.array((-1.0,) * tokens), "", "stop", ((0, 0, tokens),), routes
    )


def counted(*batches: Batch) -> RoutingCounts:
    """Return the counts of mini-batches; where they say nothing, no choice differs."""
    filled = [
        batch.add(
            {"routing_differs_T": torch.zeros(len(batch["rollout_routed_T"]), dtype=torch.int32), **batch.columns}
        )
        for batch in batches
    ]
    found = routing_counts([alone(batch) for batch in filled], Replicas(), len(SHAPE.layers))
    assert found is not None
    return found


def test_every_token_finds_its_own_record_and_the_others_are_counted() -> None:
    responses, lengths = [response(3, known=True), response(4, known=False), response(1, known=True)], [5, 6, 3]
    columns = route_columns(responses, lengths, SHAPE)
    batch = Batch(torch.tensor(lengths), columns)
    known = batch.select([2, 0])
    assert responses[2].routes is not None
    assert torch.equal(known["rollout_routes_T"][:2], responses[2].routes)
    assert known["rollout_routed_T"].tolist() == [True, True, False, True, True, True, True, False]
    assert counted(batch).missing == 5
    assert counted(known).missing == 0


def test_no_record_at_all_says_what_to_start() -> None:
    with pytest.raises(RolloutError, match="--enable-return-routed-experts"):
        route_columns([response(3, known=False)], [5], SHAPE)


def test_differences_are_shares_of_tokens_and_layers() -> None:
    columns = route_columns([response(3, known=True)], [5], SHAPE)
    batch = Batch(torch.tensor([5]), {**columns, "routing_differs_T": torch.tensor([0, 2, 1, 0, 0], dtype=torch.int32)})
    found = counted(batch).differences
    assert found is not None
    assert (found.tokens, found.layers) == (0.5, 3 / 8)
