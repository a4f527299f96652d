import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.protocol import BadAnswer, GenerationRequest, WrongVersion, parse_json, parse_results

Answer = dict[str, dict[str, object]]
REQUEST = GenerationRequest("r1", (5, 6, 7), {"max_new_tokens": 4})


def answer(**meta: object) -> dict[str, object]:
    return {
        "text": "abc",
        "output_ids": [9, 8, 2],
        "meta_info": {
            "id": "r1",
            "finish_reason": {"type": "stop", "matched": 2},
            "prompt_tokens": 3,
            "completion_tokens": 3,
            "cached_tokens": 0,
            "weight_version": "4",
            "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 3}],
            "output_token_logprobs": [[-0.5, 9, None], [-1.5, 8, None], [0.0, 2, None]],
            **meta,
        },
    }


def test_a_good_answer_is_read() -> None:
    [sample] = parse_results([answer()], [REQUEST], "here")
    assert (sample.output_ids.dtype, sample.logprobs.dtype) == (np.int32, np.float32)
    assert sample.output_ids.tolist() == [9, 8, 2]
    assert sample.logprobs.tolist() == [-0.5, -1.5, 0.0]
    assert sample.finish_reason == "stop"
    assert sample.weight_versions == (("3", 0, 1), ("4", 1, 3))


def test_scores_are_read_without_the_first_token() -> None:
    request = GenerationRequest("r1", (5, 6, 7), {"max_new_tokens": 0})
    scored = answer(
        finish_reason={"type": "length", "length": 0},
        completion_tokens=0,
        weight_versions=[],
        output_token_logprobs=[],
        input_token_logprobs=[[None, 5, None], [-1.0, 6, None], [-2.0, 7, None]],
    )
    [sample] = parse_results([{**scored, "output_ids": []}], [request], "here")
    assert sample.input_logprobs.tolist() == [-1.0, -2.0]
    assert not len(sample.logprobs)


def test_an_answer_without_weight_versions_has_one_version() -> None:
    [sample] = parse_results([answer(weight_versions=None)], [REQUEST], "here", version="4")
    assert sample.weight_versions == (("4", 0, 3),)


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no list": (lambda a: "sorry", "a str to 1 sequences"),
    "too many": (lambda a: [a, a], "2 answers to 1 sequences"),
    "other id": (lambda a: a["meta_info"].update(id="r2"), "the answer is for 'r2'"),
    "no meta": (lambda a: a.pop("meta_info"), "meta_info is 'None'"),
    "fewer tokens": (lambda a: a["output_ids"].pop(), "2 output tokens, but completion_tokens is 3"),
    "no tokens": (lambda a: (a["output_ids"].clear(), a["meta_info"].update(completion_tokens=0)), "0 output tokens"),
    "too many tokens": (
        lambda a: (a["output_ids"].extend([1, 1]), a["meta_info"].update(completion_tokens=5)),
        "5 output tokens of at most 4",
    ),
    "text for a token": (lambda a: a["output_ids"].__setitem__(0, "x"), "not all token ids"),
    "true for a token": (lambda a: a["output_ids"].__setitem__(0, True), "not all token ids"),
    "a token beyond int32": (lambda a: a["output_ids"].__setitem__(0, 1 << 31), "not all token ids"),
    "a token beyond int64": (lambda a: a["output_ids"].__setitem__(0, 1 << 70), "not all token ids"),
    "a fraction for a token": (lambda a: a["output_ids"].__setitem__(0, 1.0), "not all token ids"),
    "cut short": (lambda a: a["meta_info"].update(finish_reason={"type": "length", "length": 4}), "finished by"),
    "other finish": (lambda a: a["meta_info"].update(finish_reason={"type": "bored"}), "finish_reason is"),
    "fewer log-probs": (lambda a: a["meta_info"]["output_token_logprobs"].__delitem__(0), "2 log-probs for 3 tokens"),
    "log-prob nan": (lambda a: a["meta_info"]["output_token_logprobs"][1].__setitem__(0, math.nan), "log-prob 1"),
    "log-prob null": (lambda a: a["meta_info"]["output_token_logprobs"][1].__setitem__(0, None), "log-prob 1"),
    "log-prob above 0": (lambda a: a["meta_info"]["output_token_logprobs"][1].__setitem__(0, 0.1), "log-prob 1"),
    "log-prob true": (lambda a: a["meta_info"]["output_token_logprobs"][1].__setitem__(0, False), "log-prob 1"),
    "log-prob too low": (lambda a: a["meta_info"]["output_token_logprobs"][2].__setitem__(0, -1e39), "log-prob 2"),
    "log-prob alone": (lambda a: a["meta_info"]["output_token_logprobs"].__setitem__(1, -0.5), "log-prob 1"),
    "log-prob without token": (lambda a: a["meta_info"]["output_token_logprobs"].__setitem__(1, [-0.5]), "log-prob 1"),
    "log-prob of another": (lambda a: a["meta_info"]["output_token_logprobs"][1].__setitem__(1, 3), "log-prob 1"),
    "versions with a gap": (
        lambda a: a["meta_info"]["weight_versions"][1].update(start=2),
        "do not cover 3 output tokens",
    ),
    "versions too short": (lambda a: a["meta_info"]["weight_versions"].pop(), "do not cover 3 output tokens"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_wrong_answer_is_refused_with_what_is_wrong(lie: str) -> None:
    tell, complaint = LIES[lie]
    told = copy.deepcopy(answer())
    result = tell(told)
    whole = result if isinstance(result, str) or lie == "too many" else [told]
    with pytest.raises(BadAnswer, match=complaint) as caught:
        parse_results(whole, [REQUEST], "http://there")
    assert "http://there" in str(caught.value)
    assert isinstance(caught.value, RolloutError)


def test_another_weight_version_is_told_apart() -> None:
    with pytest.raises(WrongVersion, match=r"made with weights \['3', '4'\], not '4'"):
        parse_results([answer()], [REQUEST], "here", version="4")


def test_no_json_is_a_bad_answer() -> None:
    with pytest.raises(BadAnswer, match="not JSON"):
        parse_json(b"<html>", "here")
    assert parse_json(json.dumps([1]).encode(), "here") == [1]


@pytest.mark.processes
def test_the_protocol_does_not_need_torch() -> None:
    script = "import sys, megatron_rl.fleet.protocol; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
