"""Extraction of the answer from a response: from a tag, from a box, or by position."""

import re
from collections.abc import Callable, Mapping

NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?"  # a sign, but not the minus of 5-2
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))"  # 1,234 or 1234 or nothing before a point
    r"(?:\.\d+)?(?:[eE][-+]?\d+)?"
)
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def tag(text: str) -> str | None:
    """Return the content of the last ``<answer>...</answer>``; None without one."""
    contents = _TAG.findall(text)
    return contents[-1].strip() if contents else None


def boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}``, with balanced braces; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for at, symbol in enumerate(text[begin:], begin):
        depth += {"{": 1, "}": -1}.get(symbol, 0)
        if not depth:
            return text[begin:at].strip()
    return None


def number(text: str) -> str | None:
    """Return the last number without its thousands separators; None without one."""
    numbers = NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def last_line(text: str) -> str | None:
    """Return the last line that is not empty; None without one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


def all_text(text: str) -> str | None:
    """Return the text without surrounding white space; None if it is empty."""
    return text.strip() or None


EXTRACTORS: Mapping[str, Callable[[str], str | None]] = {
    "tag": tag,
    "boxed": boxed,
    "number": number,
    "last_line": last_line,
    "whole": all_text,
}
