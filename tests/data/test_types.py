"""A response goes through JSON unchanged; what an older version did not write gets its default."""

import json
from dataclasses import fields, replace

import numpy as np
import torch

from megatron_rl.data.types import Response

RESPONSE = Response(
    id="0.3/p1/2",
    prompt_id="p1",
    index=2,
    output_ids=np.array((5, 6, 7)),
    logprobs=np.array((-0.5, 0.0, -1.25)),
    text="a b",
    finish_reason="length",
    weight_versions=((3, 0, 1), (4, 2, 3)),
    routes=torch.arange(12, dtype=torch.int16).reshape(3, 2, 2),
    observed=((1, 2),),
    turns=("a", "x", "b"),
)


def test_a_response_goes_through_json_unchanged():
    found = Response.from_json(json.loads(json.dumps(RESPONSE.to_json())))
    for entry in fields(Response):
        value, expected = getattr(found, entry.name), getattr(RESPONSE, entry.name)
        if entry.name == "routes":
            assert value.dtype == expected.dtype
            assert torch.equal(value, expected)
        elif isinstance(expected, np.ndarray):
            assert value.dtype == expected.dtype
            assert np.array_equal(value, expected)
        else:
            assert value == expected


def test_responses_are_equal_if_their_arrays_are():
    assert replace(RESPONSE) == RESPONSE
    changed = replace(RESPONSE, output_ids=np.array([5, 6, 8])), replace(RESPONSE, logprobs=np.zeros(2))
    for other in (*changed, replace(RESPONSE, text="c")):
        assert other != RESPONSE


def test_fields_that_were_not_written_yet_get_their_defaults():
    saved = RESPONSE.to_json()
    for name in ("routes", "observed", "turns"):
        del saved[name]
    found = Response.from_json(saved)
    assert (found.routes, found.observed, found.turns) == (None, (), ())
