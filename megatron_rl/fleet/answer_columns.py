"""Columns of numbers in the bytes of an answer, read without a Python object per number.

    {"output_ids": [7, 9], "meta_info": {"output_token_logprobs": [[-0.1, 7, null], [-2.0, 9, null]], ...}}
    {"output_ids": "<key>0", "meta_info": {"output_token_logprobs": "<key>1", ...}} and two columns

Token ids, log-probs and routes are nearly all bytes of an answer. They are taken out before the rest is parsed. Numbers
in a spelling that is not read here stay in the answer, so the general parser alone decides whether they are valid.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simdjson
from pydantic_core import from_json

_FIELD = re.compile(rb'"(output_ids|output_token_logprobs|routed_experts)":\s*')
_ROW_ENDS = ((b",null],[", b",null]]"), (b"],[", b"]]"))
"""What separates two rows of log-probs, and ends the last one: with the token's text, which is null, or without."""
_PART_BYTES = 1 << 18
_MARK = 1.5
"""Stands between rows; valid neither as a log-prob nor as a token id."""
_POWERS = 10 ** np.arange(1, 10)


@dataclass(frozen=True)
class LogprobRows:
    """Rows [log-prob, token id, ...] of an answer.

    Attributes:
        raw: the rows as JSON.
        logprobs: float64.
        ids: the token ids, as float64; each was an integer in the JSON.
    """

    raw: bytes
    logprobs: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.logprobs)

    def to_list(self) -> list[object]:
        """Return the rows as the general parser reads them."""
        return from_json(self.raw)


Column = np.ndarray | LogprobRows | memoryview
"""Token ids (int64), log-probs, or the base64 text of routes."""
NO_COLUMNS: Mapping[str, Column] = {}


def cut_columns(raw: bytes, *, with_routes: bool) -> tuple[bytes, Mapping[str, Column]]:
    """Return the answer with a key in the place of each column, and the columns by key.

    A key begins with random digits, so no answer can contain it by itself.
    """
    view, position, start = memoryview(raw), 0, 0
    prefix = secrets.token_hex(8)
    rest: list[bytes | memoryview] = []
    columns: dict[str, Column] = {}
    while (match := _FIELD.search(raw, start)) is not None:
        start = match.end()
        if match[1] == b"routed_experts" and not with_routes:
            continue
        if (found := _READERS[match[1]](raw, start)) is None:
            continue
        column, stop = found
        key = f"{prefix}{len(columns)}"
        rest += [view[position:start], f'"{key}"'.encode()]
        columns[key] = column
        position = start = stop
    return b"".join([*rest, view[position:]]), columns


def _read_record(raw: bytes, start: int) -> tuple[memoryview, int] | None:
    end = raw.find(b'"', start + 1)
    return (memoryview(raw)[start + 1 : end], end + 1) if raw.startswith(b'"', start) and end >= 0 else None


def _read_ids(raw: bytes, start: int) -> tuple[np.ndarray, int] | None:
    end = raw.find(b"]", start) + 1
    if not raw.startswith(b"[", start) or not end or raw.find(b"[", start + 1, end) >= 0:
        return None
    values = _numbers(simdjson.Parser(), raw[start:end], "i", np.int64)
    return None if values is None else (values, end)


def _read_logprobs(raw: bytes, start: int) -> tuple[LogprobRows, int] | None:
    # The rows have no strings. Finding one character forward and two backward is faster than finding two forward.
    quote = raw.find(b'"', start)
    end = raw.rfind(b"]]", start, quote if quote >= 0 else len(raw)) + 2
    if not raw.startswith(b"[[", start) or end < 2:
        return None
    rows = _rows(raw[start:end])
    return None if rows is None else (rows, end)


_READERS = {b"output_ids": _read_ids, b"output_token_logprobs": _read_logprobs, b"routed_experts": _read_record}


def _numbers(
    parser: simdjson.Parser, text: bytes, kind: Literal["d", "i"], dtype: type[np.generic]
) -> np.ndarray | None:
    """Return the numbers of a JSON array; None if it is not JSON, or has values of another type."""
    try:
        array = parser.parse(text)
        assert isinstance(array, simdjson.Array), f"begins with {text[:1]!r}"
        return np.frombuffer(array.as_buffer(of_type=kind), dtype)
    except (RuntimeError, TypeError, ValueError):  # the types in which the library reports errors of the text
        return None


def _rows(raw: bytes) -> LogprobRows | None:
    """Return rows of exactly a number and an integer, and null if all have it; None for anything else."""
    text = raw.replace(b", ", b",") if b" " in raw[:100] else raw
    separator, tail = _ROW_ENDS[0] if text.endswith(_ROW_ENDS[0][1]) else _ROW_ENDS[1]
    parser, start, stop = simdjson.Parser(), 2, len(text) - len(tail)
    parts: list[np.ndarray] = []
    while start <= stop:
        # Parts that stay in the processor's cache.
        end = text.find(separator, start + _PART_BYTES, stop) if start + _PART_BYTES < stop else -1
        end = end if end >= 0 else stop
        if (part := _part(parser, text[start:end], separator)) is None:
            return None
        parts.append(part)
        start = end + len(separator)
    logprobs, ids = np.concatenate(parts, axis=1)
    return LogprobRows(raw, logprobs, ids)


def _part(parser: simdjson.Parser, text: bytes, separator: bytes) -> np.ndarray | None:
    """Return the log-probs and ids, [2, R], of rows without the brackets around them all."""
    # One flat array [log-prob, id, mark, log-prob, id, mark, ...] is read at once. Marks in every third place, as many
    # as there were separators, show that each row has two numbers.
    mark = b",%g," % _MARK
    marked = text.replace(separator, mark)
    flat = b"".join([b"[", marked, mark[:-1], b"]"])
    if flat.rfind(b"[") != 0 or flat.find(b"]") != len(flat) - 1:
        return None
    values = _numbers(parser, flat, "d", np.float64)
    if values is None or len(values) % 3:
        return None
    columns = values.reshape(-1, 3).T
    growth = (columns.shape[1] - 1) * (len(mark) - len(separator))
    is_valid = len(marked) - len(text) == growth and (columns[2] == _MARK).all() and _are_integers(flat, columns[1])
    return columns[:2] if is_valid else None


def _are_integers(flat: bytes, ids: np.ndarray) -> bool:
    """Return whether the second number of each row is written as an integer, not as 7.0 or 1e2."""
    characters = np.frombuffer(flat, np.uint8)
    commas = np.flatnonzero(characters == ord(","))
    starts, stops = commas[0::3] + 1, commas[1::3]
    digits = np.searchsorted(_POWERS, ids, side="right") + 1
    if (stops - starts != digits).any():
        return False  # a number with a fraction has more characters than digits before the point
    exponents = np.flatnonzero(characters == ord("e"))
    return b"E" not in flat and not (np.searchsorted(commas, exponents) % 3 == 1).any()
