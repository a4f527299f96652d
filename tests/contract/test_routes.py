"""The experts that a server says its tokens took, against transformers on the same tokens."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.data.routes import RouteShape
from tests.contract.conftest import LONG, Contract
from tests.contract.test_control import during

SHAPE = RouteShape(layers=(0, 1), all_layers=2, experts=4, per_token=2)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
BODY = {"sampling_params": {"max_new_tokens": 12, "ignore_eos": True}, "return_routed_experts": True}


def chosen_by_transformers(folder: Path, ids: list[int]) -> np.ndarray:
    """Return [T, L, E], ordered within each token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
    return torch.stack([layer.topk(SHAPE.per_token).indices.sort().values for layer in logits], dim=1).numpy()


def recorded(prompt: list[int], answer: dict[str, object]) -> np.ndarray:
    ids, meta = answer["output_ids"], answer["meta_info"]
    assert isinstance(ids, list)
    assert isinstance(meta, dict)
    return np.sort(SHAPE.decode(meta["routed_experts"], len(prompt) + len(ids) - 1), axis=-1)


def check(server: Contract, prompt: list[int], answer: dict[str, object]) -> None:
    ids = answer["output_ids"]
    assert isinstance(ids, list)
    truth = chosen_by_transformers(server.model, [*prompt, *ids])[:-1]
    # float32 on both sides: of these few dozen choices none is so near a tie that rounding decides.
    assert np.array_equal(recorded(prompt, answer), truth)


def test_every_token_but_the_last_has_its_experts(server: Contract) -> None:
    answer = server.json("/generate", {**BODY, "input_ids": PROMPT})
    check(server, PROMPT, answer)


def test_a_prompt_that_was_seen_before_has_them_too(server: Contract) -> None:
    longer = PROMPT * 4
    server.json("/generate", {**BODY, "input_ids": longer})
    check(server, longer, server.json("/generate", {**BODY, "input_ids": longer}))


def test_prompts_of_one_request_have_each_their_own(server: Contract) -> None:
    prompts = [PROMPT, PROMPT[:3], PROMPT * 2, PROMPT[:3]]
    asked = {**BODY, "input_ids": prompts}
    _, text = server.ask("/generate", asked)
    answers = json.loads(text)
    for prompt, answer in zip(prompts, answers, strict=True):
        check(server, prompt, answer)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_loses_none(server: Contract, mode: str) -> None:
    async def pause() -> None:
        await server.ask_async("/pause_generation", {"mode": mode})
        await server.ask_async("/continue_generation", {})

    body = {**LONG, "return_routed_experts": True}
    answer = asyncio.run(during(server, body, pause))
    prompt = body["input_ids"]
    assert isinstance(prompt, list)
    check(server, prompt, answer)


def test_an_aborted_answer_has_those_of_its_tokens(server: Contract) -> None:
    async def abort() -> None:
        await server.ask_async("/abort_request", {"abort_all": True})

    body = {**LONG, "return_routed_experts": True}
    answer = asyncio.run(during(server, body, abort))
    prompt = body["input_ids"]
    assert isinstance(prompt, list)
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    check(server, prompt, answer)


def test_nobody_gets_them_unasked(server: Contract) -> None:
    asked = {key: value for key, value in BODY.items() if key != "return_routed_experts"}
    assert server.json("/generate", {**asked, "input_ids": PROMPT})["meta_info"].get("routed_experts") is None
