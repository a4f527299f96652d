"""The ids that a token was sampled from, on their way from an engine's answer into a batch."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from megatron_rl.config.rollout import Rollout, Sampling
from megatron_rl.data.types import Prompt, Response
from megatron_rl.errors import RolloutError
from megatron_rl.fleet.partial import join_results
from megatron_rl.fleet.protocol import BadAnswer, GenerationRequest, generate_body, parse_results
from megatron_rl.fleet.request_plan import plan_requests
from megatron_rl.rollout.sampling_masks import mask_columns
from tests.fleet.test_protocol import answer

REQUEST = GenerationRequest("r1", (5, 6, 7), {"max_new_tokens": 4}, keep_mask=True)
MASK = {"output_token_sampling_mask": [[9, 4], [8], [1, 2, 3]], "output_token_sampling_logprobs": [-0.25, 0.0, -1.0]}


def test_a_mask_is_requested_and_its_log_probs_replace_the_others() -> None:
    [sample] = parse_results([answer(**MASK)], [REQUEST], "here")
    assert sample.mask_ids == ((9, 4), (8,), (1, 2, 3))
    assert sample.logprobs.tolist() == [-0.25, 0.0, -1.0]
    assert generate_body([REQUEST])["return_sampling_mask"] is True
    [plain] = parse_results([answer(**MASK)], [replace(REQUEST, keep_mask=False)], "here")
    assert plain.mask_ids is None
    assert plain.logprobs.tolist() == [-0.5, -1.5, 0.0]
    assert "return_sampling_mask" not in generate_body([replace(REQUEST, keep_mask=False)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"output_token_sampling_mask": [[9], [8]]}, "2 sampling masks for 3 tokens"),
        ({"output_token_sampling_mask": [[9], [7], [2]]}, "mask of output token 1, id 8, is"),
        ({"output_token_sampling_mask": [[9], [8, "a"], [2]]}, "mask of output token 1, id 8, is"),
        ({"output_token_sampling_logprobs": [-0.5]}, "1 log-probs for 3 tokens"),
        ({"output_token_sampling_logprobs": None}, "expected a list"),
    ],
)
def test_a_wrong_mask_is_no_answer(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(BadAnswer, match=message):
        parse_results([answer(**{**MASK, **wrong})], [REQUEST], "here")


def test_masks_of_two_pieces_are_joined() -> None:
    [piece] = parse_results([answer(**MASK)], [REQUEST], "here")
    assert join_results(piece, piece).mask_ids == ((9, 4), (8,), (1, 2, 3)) * 2
    assert join_results(piece, replace(piece, mask_ids=None)).mask_ids is None


def sampled() -> Response:
    prompt = Prompt("p", (5, 6, 7), "", "")
    [batch] = plan_requests([prompt], 1, {"max_new_tokens": 4}, (0,), 8, keep_mask=True)
    [request] = batch.requests
    [sequence] = request.sequences
    versions = [{"version": "3", "start": 0, "end": 3}]
    results = parse_results([answer(**MASK, id=sequence.rid, weight_versions=versions)], [sequence], "here")
    [response] = request.responses(results)
    return response


def test_every_token_finds_its_ids() -> None:
    response = sampled()
    assert response.mask_ids is not None
    assert response.mask_ids.tolist() == [[9, 4, -1], [8, -1, -1], [1, 2, 3]]
    again = Response.from_json(response.to_json()).mask_ids
    assert again is not None
    assert torch.equal(again, response.mask_ids)
    narrow = replace(
        response, mask_ids=torch.tensor([[7], [8]], dtype=torch.int32), output_ids=torch.tensor([7, 8]).numpy()
    )
    mask_ids_TQ = mask_columns([narrow, response], [4, 6])["mask_ids_T"]
    assert mask_ids_TQ.dtype == torch.int32
    assert mask_ids_TQ[:, 0].tolist() == [-1, -1, 7, 8, -1, -1, -1, 9, 8, 1]
    assert mask_ids_TQ[-1].tolist() == [1, 2, 3]


def test_a_response_without_a_mask_says_what_to_do() -> None:
    with pytest.raises(RolloutError, match="keep_mask = false"):
        mask_columns([replace(sampled(), mask_ids=None)], [6])


def test_a_mask_needs_a_bound_and_an_engine_that_returns_it() -> None:
    assert Sampling(keep_mask=True, top_k=50, top_p=0.9).keep_mask
    for sampling in ({"top_p": 0.9}, {"top_k": 5000}):
        with pytest.raises(ValidationError, match="top_k of at most 1024"):
            Sampling.model_validate({"keep_mask": True, **sampling})
    with pytest.raises(ValidationError, match=r"SGLang 0\.5\.23"):
        Rollout.model_validate({"engine": "vllm", "sampling": {"keep_mask": True, "top_k": 50}})
