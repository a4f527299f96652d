from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.inference_server.requests import ActiveSequence
from tests.inference_server.tiny import finished, prompts_of, request_of, running

LENGTHS = (3, 9, 5, 9, 1, 12)


def assert_logprobs_are_the_models(folder: Path, sequences: Sequence[ActiveSequence]) -> None:
    """Compare every reported log-prob with a full forward pass over prompt and answer."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for sequence in sequences:
        with torch.no_grad():
            logits_TV = model(torch.tensor([sequence.prompt + sequence.output_ids])).logits[0]
        logits_TV = logits_TV[len(sequence.prompt) - 1 : -1] / (sequence.params.temperature or 1)
        expected_T = logits_TV.log_softmax(-1).gather(1, torch.tensor(sequence.output_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sequence.logprobs), expected_T, atol=1e-5, rtol=0)


def test_greedy_decoding_equals_generate_token_by_token(model_folder: Path) -> None:
    prompts = prompts_of(*LENGTHS)
    with running(model_folder) as engine:
        [sequences] = finished(engine, request_of(prompts, [{"temperature": 0, "max_new_tokens": 24}] * len(prompts)))
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    for sequence in sequences:
        ids = torch.tensor([sequence.prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        assert sequence.output_ids == whole[0, len(sequence.prompt) :].tolist()
        assert sequence.finish_reason == {"type": "length", "length": 24}
    assert_logprobs_are_the_models(model_folder, sequences)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_full_forward_pass(model_folder: Path, temperature: float) -> None:
    prompts = prompts_of(*LENGTHS, *LENGTHS)
    params = [
        {"temperature": temperature, "max_new_tokens": 4 + 3 * i, "sampling_seed": i} for i in range(len(prompts))
    ]
    with running(model_folder) as engine:
        [sequences] = finished(engine, request_of(prompts, params))
    assert [len(sequence.output_ids) for sequence in sequences] == [4 + 3 * i for i in range(len(prompts))]
    assert_logprobs_are_the_models(model_folder, sequences)


def test_merged_rows_have_the_models_logprobs_and_their_own_tokens(model_folder: Path) -> None:
    prompts = prompts_of(*LENGTHS)
    requests = [
        request_of([prompt], [{"max_new_tokens": 5 + 7 * i, "sampling_seed": i, "temperature": 0.8}])
        for i, prompt in enumerate(prompts)
    ]
    again = [
        request_of([prompt], [{"max_new_tokens": 5 + 7 * i, "sampling_seed": i, "temperature": 0.8}])
        for i, prompt in enumerate(prompts)
    ]
    with running(model_folder, "continuous", max_sequences=4) as engine:
        merged = [sequence for [sequence] in finished(engine, *requests)]
    with running(model_folder, "request") as engine:
        alone = [sequence for [sequence] in finished(engine, *again)]
    assert_logprobs_are_the_models(model_folder, merged)
    assert [sequence.output_ids for sequence in merged] == [sequence.output_ids for sequence in alone]


def test_same_request_same_bits_alone_or_among_others(model_folder: Path) -> None:
    prompts = prompts_of(*LENGTHS) * 3
    params = [{"max_new_tokens": 6 + i, "sampling_seed": i} for i in range(len(prompts))]
    with running(model_folder, max_sequences=8) as engine:
        [first] = finished(engine, request_of(prompts, params))
        other = prompts_of(7, 2, seed=5)
        crowd = [request_of(other, [{"max_new_tokens": 9}, {"max_new_tokens": 3}]) for _ in range(3)]
        again = request_of(prompts, params)
        finished(engine, crowd[0], again, *crowd[1:])
    assert [(s.output_ids, s.logprobs) for s in first] == [(s.output_ids, s.logprobs) for s in again.sequences]


def test_equal_prompts_have_different_answers_by_seed(moe_folder: Path) -> None:
    with running(moe_folder) as engine:
        [sequences] = finished(engine, request_of(prompts_of(6), [{"max_new_tokens": 8, "n": 6, "sampling_seed": 1}]))
        [unseeded] = finished(engine, request_of(prompts_of(6), [{"max_new_tokens": 8, "n": 6}]))
    assert len({tuple(sequence.output_ids) for sequence in sequences}) == 6
    assert len({tuple(sequence.output_ids) for sequence in unseeded}) == 6
    assert_logprobs_are_the_models(moe_folder, sequences)


def test_a_stop_token_ends_a_row_and_is_its_last_token(moe_folder: Path) -> None:
    prompts = prompts_of(4)
    with running(moe_folder) as engine:
        [[whole]] = finished(engine, request_of(prompts, [{"max_new_tokens": 20, "sampling_seed": 3}]))
        stop = whole.output_ids[6]
        first = whole.output_ids.index(stop)
        params = {"max_new_tokens": 20, "sampling_seed": 3, "stop_token_ids": [stop]}
        [[stopped]] = finished(engine, request_of(prompts, [params]))
        [[ignoring]] = finished(engine, request_of(prompts, [{**params, "ignore_eos": True}]))
        [[at_limit]] = finished(engine, request_of(prompts, [{**params, "max_new_tokens": first + 1}]))
    assert stopped.output_ids == whole.output_ids[: first + 1]
    assert stopped.finish_reason == {"type": "stop", "matched": stop}
    assert ignoring.output_ids == whole.output_ids
    assert at_limit.finish_reason == {"type": "length", "length": first + 1}  # as SGLang: the length is looked at first


def test_scores_equal_a_full_forward_pass(model_folder: Path) -> None:
    prompts = prompts_of(*LENGTHS)
    with running(model_folder) as engine:
        params = [{"max_new_tokens": 0}] * len(prompts)
        [sequences] = finished(engine, request_of(prompts, params, logprob_start_len=0))
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    for sequence in sequences:
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([sequence.prompt])).logits[0, :-1].log_softmax(-1)
        expected_T = logprobs_TV.gather(1, torch.tensor(sequence.prompt[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sequence.input_logprobs), expected_T, atol=1e-5, rtol=0)
        assert sequence.output_ids == []
