"""What the client makes of answers that the real SGLang gave."""

import asyncio
import json

import pytest

from tests.contract.recorded import FILE, Tape, hold
from tests.inference_server import tiny


@pytest.fixture
def tape() -> Tape:
    return Tape(entries=json.loads(FILE.read_text()))


def test_the_client_reads_every_recorded_answer(tape: Tape) -> None:
    heard = asyncio.run(hold(tape.replay))
    assert tape.entries == []
    assert [sample.rid for sample in heard.samples] == ["1.0/p/0", "1.0/p/1", "1.0/p/2", "1.0/p/3"]
    for version, samples in (("0", heard.samples), ("1", heard.after)):
        for sample in samples:
            assert 0 < len(sample.output_ids) <= 5
            assert len(sample.logprobs) == len(sample.output_ids)
            assert sample.weight_versions == ((version, 0, len(sample.output_ids)),)
            assert (sample.finish_reason == "stop") == (sample.output_ids[-1] == 7)
    assert [len(score.input_logprobs) for score in heard.scores] == [3, 3]
    assert heard.scores[1].rid == f"score/{tiny.VOCABULARY - 1}"
    assert "longer than the model's context length" in heard.refusal
    assert (heard.report.failed, heard.version) == ({}, "1")


def test_weights_that_arrived_otherwise_are_found_in_recorded_checksums(tape: Tape) -> None:
    [entry] = [entry for entry in tape.entries if entry["path"] == "/weights_checker"]
    entry["answer"]["ranks"][0]["checksums"]["lm_head.weight"] = "0" * 16
    named = [entry for entry in tape.entries if entry["path"] == "/update_weight_version"]
    tape.entries.remove(named[1])  # weights that are not right are not named
    heard = asyncio.run(hold(tape.replay))
    [error] = heard.report.failed.values()
    assert "tensors differ from what was sent, first 'lm_head.weight'" in str(error)
