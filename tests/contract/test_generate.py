import asyncio
import itertools
import json
from typing import Any

import pytest

from tests.contract.conftest import Contract

PROMPT = [3, 1, 4, 1, 5]


def generate(server: Contract, input_ids: object = PROMPT, **more: object) -> dict[str, Any]:
    params = {"max_new_tokens": 6, "temperature": 1.0}
    return server.json("/generate", {"input_ids": input_ids, "sampling_params": params, "return_logprob": True, **more})


def generate_all(server: Contract, prompts: list[list[int]], **more: object) -> list[dict[str, Any]]:
    answers: object = generate(server, prompts, **more)
    assert isinstance(answers, list)
    return answers


def test_one_prompt_is_one_object_with_everything_the_trainer_needs(server: Contract) -> None:
    answer = generate(server, rid="my-id")
    meta = answer["meta_info"]
    assert set(answer) >= {"text", "output_ids", "meta_info"}
    assert len(answer["output_ids"]) == 6
    assert meta["id"] == "my-id"
    assert meta["finish_reason"] == {"type": "length", "length": 6}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (5, 6)
    assert meta["cached_tokens"] >= 0
    assert meta["e2e_latency"] > 0
    [span] = meta["weight_versions"]
    assert span == {"version": meta["weight_version"], "start": 0, "end": 6}
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
    assert all(entry[0] <= 0 and entry[2] is None for entry in meta["output_token_logprobs"])


def test_a_list_of_prompts_is_a_list_of_answers_in_order(server: Contract) -> None:
    params = [{"max_new_tokens": n} for n in (2, 5, 3)]
    answers = generate_all(server, [[1], [2, 3], [4, 5, 6]], sampling_params=params, rid=["a", "b", "c"])
    assert [a["meta_info"]["id"] for a in answers] == ["a", "b", "c"]
    assert [len(a["output_ids"]) for a in answers] == [2, 5, 3]
    assert [a["meta_info"]["prompt_tokens"] for a in answers] == [1, 2, 3]


def test_n_answers_come_prompt_by_prompt(server: Contract) -> None:
    answers = generate_all(server, [[1], [2, 3]], sampling_params={"max_new_tokens": 4, "n": 3})
    assert [a["meta_info"]["prompt_tokens"] for a in answers] == [1, 1, 1, 2, 2, 2]
    assert len({a["meta_info"]["id"] for a in answers}) == 6


def test_logprobs_are_left_out_unless_asked_for(server: Contract) -> None:
    assert "output_token_logprobs" not in generate(server, return_logprob=False)["meta_info"]


def test_zero_new_tokens_scores_the_prompt(server: Contract) -> None:
    meta = generate(server, sampling_params={"max_new_tokens": 0}, logprob_start_len=0)["meta_info"]
    entries = meta["input_token_logprobs"]
    assert [entry[1] for entry in entries] == PROMPT
    assert entries[0][0] is None
    assert all(entry[0] < 0 for entry in entries[1:])


def test_scores_of_sampled_tokens_are_their_logprobs(server: Contract) -> None:
    sampled = generate(server)
    whole = PROMPT + sampled["output_ids"]
    scored = generate(server, whole, sampling_params={"max_new_tokens": 0}, logprob_start_len=0)
    theirs = [entry[0] for entry in scored["meta_info"]["input_token_logprobs"][len(PROMPT) :]]
    ours = [entry[0] for entry in sampled["meta_info"]["output_token_logprobs"]]
    assert theirs == pytest.approx(ours, abs=1e-5)


def test_temperature_zero_is_greedy_and_reports_temperature_one(server: Contract) -> None:
    greedy = generate(server, sampling_params={"max_new_tokens": 6, "temperature": 0})
    again = generate(server, sampling_params={"max_new_tokens": 6, "temperature": 1, "top_k": 1})
    assert greedy["output_ids"] == again["output_ids"]
    first = [entry[0] for entry in greedy["meta_info"]["output_token_logprobs"]]
    second = [entry[0] for entry in again["meta_info"]["output_token_logprobs"]]
    assert first == pytest.approx(second, abs=1e-5)
    assert first[0] < -0.01


def test_a_stop_token_is_the_last_token(server: Contract) -> None:
    params = {"max_new_tokens": 6, "temperature": 0}
    whole = generate(server, sampling_params=params)["output_ids"]
    stopped = generate(server, sampling_params={**params, "stop_token_ids": [whole[2]]})
    assert stopped["output_ids"] == whole[: whole.index(whole[2]) + 1]
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": whole[2]}


def test_equal_seeds_are_answered_equally(server: Contract) -> None:
    if not server.repeats:
        pytest.skip(f"{server.engine} does not promise it")
    params = {"max_new_tokens": 20, "sampling_seed": 11}
    first, second = (generate(server, sampling_params=params) for _ in range(2))
    other = generate(server, sampling_params={**params, "sampling_seed": 12})
    assert first["output_ids"] == second["output_ids"] != other["output_ids"]
    logprobs = [answer["meta_info"]["output_token_logprobs"] for answer in (first, second)]
    assert logprobs[0] == logprobs[1]


def test_a_stream_grows_and_ends(server: Contract) -> None:
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 150, "ignore_eos": True}, "stream": True}
    status, text = server.ask("/generate", body)
    assert status == 200
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    grown = [json.loads(event)["output_ids"] for event in events[:-1]]
    assert all(a == b[: len(a)] for a, b in itertools.pairwise(grown))
    assert len(grown[-1]) == 150


@pytest.mark.parametrize(
    "body",
    [
        {"input_ids": [1] * 300},
        {"input_ids": [[1, 2], [1] * 300]},
        {"input_ids": []},
        {"input_ids": [1], "sampling_params": {"max_new_tokens": -1}},
        {"input_ids": [1], "sampling_params": {"temperature": -1.0}},
        {"input_ids": [1], "sampling_params": {"top_p": 0.0}},
    ],
)
def test_what_cannot_be_served_is_refused_with_a_message(server: Contract, body: dict[str, Any]) -> None:
    status, text = server.ask("/generate", body)
    assert status == 400
    assert json.loads(text)["error"]["message"]
    assert len(generate(server)["output_ids"]) == 6


def test_requests_at_the_same_time_are_all_answered(server: Contract) -> None:
    async def all_at_once() -> list[tuple[int, str]]:
        bodies = [
            {"input_ids": [1, 2, i], "sampling_params": {"max_new_tokens": 5 + i}, "rid": str(i)} for i in range(9)
        ]
        return await asyncio.gather(*(server.ask_async("/generate", body) for body in bodies))

    answers = [json.loads(text) for status, text in asyncio.run(all_at_once()) if status == 200]
    assert [(a["meta_info"]["id"], len(a["output_ids"])) for a in answers] == [(str(i), 5 + i) for i in range(9)]
