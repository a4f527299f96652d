import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rl.inference_server.engine import Engine, EngineStopped, PauseMode
from megatron_rl.inference_server.requests import BadRequest
from tests.inference_server.tiny import finished, prompts_of, request_of, running

LONG = {"max_new_tokens": 200, "sampling_seed": 1}


def wait_for_tokens(engine: Engine) -> None:
    """Return when sequences have been decoded for a few steps."""
    while engine.call(lambda: max(engine.batch.counts(), default=0) if engine.batch else 0).result() < 5:
        time.sleep(0.001)


def double(engine: Engine) -> Callable[[], None]:
    def change() -> None:
        engine.model.tensors["model.norm.weight"].mul_(2)

    return change


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_paused_rows_go_on_and_finish_with_the_same_tokens(moe_folder: Path, mode: PauseMode) -> None:
    prompts = prompts_of(4, 7, 5)
    params = [{"max_new_tokens": 60 + i, "sampling_seed": i} for i in range(3)]
    with running(moe_folder) as engine:
        [undisturbed] = finished(engine, request_of(prompts, params))
        request = request_of(prompts, params)
        engine.submit(request)
        wait_for_tokens(engine)
        engine.call(lambda: engine.pause(mode)).result()
        assert not request.done.done()
        engine.call(engine.resume).result()
        request.done.result(timeout=30)
    assert [sequence.output_ids for sequence in request.sequences] == [sequence.output_ids for sequence in undisturbed]
    assert [sequence.num_retractions for sequence in request.sequences] == [int(mode == "retract")] * 3


def test_sampling_masks_follow_their_tokens_through_a_retraction(moe_folder: Path) -> None:
    params = [{"max_new_tokens": 40 + 20 * i, "sampling_seed": i, "top_k": 3 + i, "top_p": 0.9} for i in range(3)]
    with running(moe_folder) as engine:
        request = request_of(prompts_of(4, 7, 5), params, return_sampling_mask=True)
        engine.submit(request)
        wait_for_tokens(engine)
        engine.call(lambda: engine.pause("retract")).result()
        engine.call(engine.resume).result()
        request.done.result(timeout=30)
        with pytest.raises(BadRequest, match="nothing is masked"):
            request_of(prompts_of(4), [{"max_new_tokens": 4}], return_sampling_mask=True)
    for i, sequence in enumerate(request.sequences):
        assert len(sequence.mask_ids) == len(sequence.mask_logprobs) == len(sequence.output_ids)
        for token_id, kept, logprob, full in zip(
            sequence.output_ids, sequence.mask_ids, sequence.mask_logprobs, sequence.logprobs, strict=True
        ):
            assert token_id in kept
            assert 1 <= len(kept) <= 3 + i
            assert full <= logprob + 1e-6 <= 1e-5


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_weight_change_in_the_middle_is_recorded_token_by_token(moe_folder: Path, mode: PauseMode) -> None:
    prompts = prompts_of(4, 7)
    with running(moe_folder) as engine:
        request = request_of(prompts, [LONG] * 2)
        engine.submit(request)
        wait_for_tokens(engine)
        engine.call(lambda: engine.pause(mode)).result()
        engine.call(lambda: engine.change_weights(double(engine), "1")).result()
        engine.call(engine.resume).result()
        request.done.result(timeout=30)
        for sequence in request.sequences:
            [(first, start), (second, change)] = sequence.versions
            assert (first, start, second) == ("0", 0, "1")
            assert 5 <= change < 200
            old = request_of([sequence.prompt], [LONG])
            engine.call(lambda: engine.model.tensors["model.norm.weight"].div_(2)).result()
            finished(engine, old)
            engine.call(double(engine)).result()
            assert sequence.output_ids[:change] == old.sequences[0].output_ids[:change]
            assert sequence.output_ids != old.sequences[0].output_ids
            # Log-probs under the new weights. Only a retracted sequence has its whole cache computed again.
            if mode == "retract":
                new = engine.model.model
                with torch.no_grad():
                    logits_TV = new(torch.tensor([sequence.prompt + sequence.output_ids])).logits[0]
                logits_TV = logits_TV[len(sequence.prompt) - 1 : -1]
                expected_T = logits_TV.log_softmax(-1).gather(1, torch.tensor(sequence.output_ids)[:, None])[:, 0]
                torch.testing.assert_close(
                    torch.tensor(sequence.logprobs)[change:], expected_T[change:], atol=1e-5, rtol=0
                )


def test_abort_by_id_ends_one_row_with_what_it_has(moe_folder: Path) -> None:
    with running(moe_folder) as engine:
        request = request_of(prompts_of(4, 4), [LONG, {**LONG, "max_new_tokens": 40}], rid=["one", "two"])
        engine.submit(request)
        wait_for_tokens(engine)
        engine.call(lambda: engine.abort("one")).result()
        request.done.result(timeout=30)
    aborted, other = request.sequences
    assert aborted.finish_reason is not None
    assert aborted.finish_reason["type"] == "abort"
    assert 0 < len(aborted.output_ids) == len(aborted.logprobs) < 200
    assert other.finish_reason == {"type": "length", "length": 40}


def test_pause_abort_ends_running_and_waiting_rows(moe_folder: Path) -> None:
    with running(moe_folder) as engine:
        requests = [request_of(prompts_of(4), [LONG]) for _ in range(3)]
        for request in requests:
            engine.submit(request)
        wait_for_tokens(engine)
        engine.call(lambda: engine.pause("abort")).result()
        for request in requests:
            request.done.result(timeout=30)
            assert request.sequences[0].finish_reason is not None
            assert request.sequences[0].finish_reason["type"] == "abort"
        late = request_of(prompts_of(4), [{"max_new_tokens": 2}])
        engine.submit(late)
        time.sleep(0.05)
        assert not late.done.done()
        engine.call(engine.resume).result()
        late.done.result(timeout=30)


def test_flush_is_refused_only_while_rows_are_in_place(moe_folder: Path) -> None:
    with running(moe_folder) as engine:
        engine.call(engine.flush).result()
        request = request_of(prompts_of(4), [LONG])
        engine.submit(request)
        wait_for_tokens(engine)
        engine.call(lambda: engine.pause("in_place")).result()
        with pytest.raises(BadRequest, match="1 sequences are running"):
            engine.call(engine.flush).result()
        engine.call(lambda: engine.pause("retract")).result()
        engine.call(engine.flush).result()


def test_rows_beyond_max_sequences_wait_their_turn(moe_folder: Path) -> None:
    prompts = prompts_of(*[5] * 11)
    with running(moe_folder, max_sequences=4) as engine:
        [sequences] = finished(engine, request_of(prompts, [{"max_new_tokens": 7}] * 11))
    assert [len(sequence.output_ids) for sequence in sequences] == [7] * 11


def test_nobody_waits_for_an_engine_that_failed(moe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", print)  # the failure is wanted: pytest would warn of it
    with running(moe_folder) as engine:
        request = request_of(prompts_of(4), [LONG])
        engine.submit(request)
        engine.call(lambda: setattr(engine, "batch", "broken"))
        with pytest.raises(EngineStopped):
            request.done.result(timeout=30)
        with pytest.raises(EngineStopped):
            engine.call(lambda: None).result(timeout=30)
