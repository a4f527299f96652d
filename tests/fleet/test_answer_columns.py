"""Columns that are read from an answer's bytes are those of the general parser, and so are refusals."""

import json
import math
import random

import numpy as np
import pytest

from megatron_rl.data.routes import RouteShape, encode_routes
from megatron_rl.fleet.answer_columns import LogprobRows, cut_columns
from megatron_rl.fleet.protocol import (
    BadAnswer,
    GenerationRequest,
    GenerationResult,
    parse_answer,
    parse_json,
    parse_results,
)

SHAPE = RouteShape((1, 2), 3, 6, 2)
IDS = (0, 7, 9, 10, 99, 100, 1000, 128_255, (1 << 31) - 1)
LOGPROBS = (0, -0.0, -1, -0.5, -1.1920928955078125e-07, -2e-05, -12.25, -1e-3, 1e-4, -3.4e38)
SPELLINGS = (
    b"1.5", b"-1", b"-0", b"7.0", b"1e2", b"1E2", b"10e1", b"07", b"+7", b".5", b"7.", b"NaN", b"-Infinity", b"null",
    b"true", b'"7"', b"[7]", b"[[7]]", b"{}", b"1e400", b"-1e39", b"9223372036854775808", b"99999999999999999999999",
    b"-99999999999999999999", b"", b" 7", b"7 ", b"7\n", b"0.0010001", b"\xff", b"2147483648", b"100", b"1.0e2", b"0.0",
)  # fmt: skip
SEPARATORS = (
    b",",
    b", ",
    b" ,",
    b"],[",
    b",null],[",
    b", null], [",
    b"]",
    b"[",
    b"]]",
    b"[[",
    b"",
    b",\n",
    b",null",
    b'"',
)


def answer(source: random.Random, *, routes: bool) -> tuple[bytes, GenerationRequest]:
    """Return a valid answer, and its request."""
    count = source.randrange(0, 6)
    ids = [source.choice(IDS) for _ in range(count)]
    tail = source.choice(([None], [], ["text"], [None, 1]))
    meta: dict[str, object] = {
        "id": "r",
        "finish_reason": {"type": "length", "length": count},
        "completion_tokens": count,
        "weight_version": "3",
        "output_token_logprobs": [[source.choice(LOGPROBS), i, *tail] for i in ids],
    }
    if routes:
        meta["routed_experts"] = encode_routes(np.tile([[[0, 1], [2, 3], [5, 4]]], (count, 1, 1)))
    whole = [{"text": 'a"output_ids":[1]', "output_ids": ids, "meta_info": meta}]
    separators = source.choice(((",", ":"), (", ", ": ")))
    return json.dumps(whole, separators=separators).encode(), GenerationRequest(
        "r", (1,), {"max_new_tokens": 8}, SHAPE if routes else None
    )


def damaged(raw: bytes, source: random.Random) -> bytes:
    """Return the answer with another spelling, separator, byte, or a field twice, in a random place."""
    kind, place = source.randrange(5), source.randrange(len(raw))
    if kind == 0:
        start = max(raw.rfind(c, 0, place) for c in (b",", b"[", b":")) + 1
        ends = [end for c in (b",", b"]", b"}") if (end := raw.find(c, start)) >= 0]
        return raw[:start] + source.choice(SPELLINGS) + raw[min(ends) if ends else len(raw) :]
    if kind == 1 and (comma := raw.find(b",", place)) >= 0:
        return raw[:comma] + source.choice(SEPARATORS) + raw[comma + 1 :]
    if kind == 2:
        return raw[:place] + bytes([source.choice(b'0123456789.,-+eE[]{}" \nn')]) + raw[place + 1 :]
    if kind == 3:
        fields = (
            b'"output_ids":[7]',
            b'"output_token_logprobs":[[-1,7,null]]',
            b'"output_ids":null',
            b'"routed_experts":""',
        )
        return raw.replace(b'"text"', source.choice(fields) + b',"text"', 1)
    return raw[:place] + raw[place + source.randrange(1, 6) :]


def outcome(parse: object) -> tuple[object, ...]:
    """Return what a parser makes of an answer, comparable bit for bit."""
    try:
        [result] = parse()  # type: ignore[operator]
    except BadAnswer:
        return ("refused",)
    assert isinstance(result, GenerationResult)
    arrays = (result.output_ids, result.logprobs, np.empty(0) if result.routes is None else result.routes)
    described = tuple((array.dtype.name, array.shape, array.tobytes()) for array in arrays)
    return (*described, result.text, result.finish_reason, result.weight_versions, result.routes is None)


@pytest.mark.parametrize("routes", [False, True])
def test_an_answer_is_accepted_with_the_columns_of_the_general_parser_or_refused_like_there(routes: bool) -> None:
    source = random.Random(17)
    accepted = 0
    for _ in range(6000):
        raw, request = answer(source, routes=routes)
        for _ in range(source.choice((0, 1, 1, 1, 2))):
            raw = damaged(raw, source)
        found = outcome(lambda raw=raw, request=request: parse_answer(raw, [request], "here"))
        expected = outcome(
            lambda raw=raw, request=request: parse_results(parse_json(raw, "here"), [request], "here"),
        )
        assert found == expected, raw
        accepted += found != ("refused",)
    assert 1000 < accepted < 5000


@pytest.mark.parametrize(
    ("separators", "tail"), [((",", ":"), [None]), ((", ", ": "), [None]), ((",", ":"), []), ((", ", ": "), [])]
)
def test_the_usual_spellings_are_read_from_the_bytes(separators: tuple[str, str], tail: list[None]) -> None:
    ids = [*IDS] * 40_000  # several parts
    logprobs = [LOGPROBS[i % len(LOGPROBS)] for i in range(len(ids))]
    rows = [[p, i, *tail] for p, i in zip(logprobs, ids, strict=True)]
    fields = {"output_ids": ids, "meta_info": {"output_token_logprobs": rows, "x": [[1]]}, "y": 1}
    rest, columns = cut_columns(json.dumps(fields, separators=separators).encode(), with_routes=False)
    found_ids, found_rows = columns.values()
    assert isinstance(found_ids, np.ndarray)
    assert isinstance(found_rows, LogprobRows)
    assert found_ids.tolist() == found_rows.ids.tolist() == ids
    assert found_rows.logprobs.tolist() == logprobs
    assert found_rows.to_list() == rows
    assert list(json.loads(rest)["meta_info"]) == ["output_token_logprobs", "x"]


@pytest.mark.parametrize(
    "row",
    ["[7]", "[-1,7,1.5,-1,7]", "[-1,7.0]", "[-1,1e0]", "[-1,[7]]", "[-1,-0]", "[null,7]", "[NaN,7]", "[]", "[-1,7, ]"],
)
def test_an_unusual_row_is_left_to_the_general_parser(row: str) -> None:
    raw = f'{{"output_token_logprobs":[[-1,7],{row},[-1,7]]}}'.encode()
    assert cut_columns(raw, with_routes=False) == (raw, {})


def test_a_wrong_log_prob_is_named() -> None:
    rows = [[-0.5, 7, None], [math.nan, 9, None]]
    for wrong, name in (([-0.5, 8, None], r"\[-0.5, 8, None\]"), ([0.5, 9, None], r"\[0.5, 9, None\]")):
        meta = {"id": "r", "finish_reason": {"type": "length", "length": 2}, "completion_tokens": 2}
        entry = {"text": "", "output_ids": [7, 9], "meta_info": {**meta, "output_token_logprobs": [rows[0], wrong]}}
        request = GenerationRequest("r", (1,), {"max_new_tokens": 2})
        with pytest.raises(BadAnswer, match=f"log-prob 1 is {name}, for token 9"):
            parse_answer(json.dumps([entry]).encode(), [request], "here")
