"""Extraction of the answer from a response: from a tag, from a box, or by position."""

import re
from collections.abc import Callable, Mapping

from megatron_rl.tasks.number_text import NUMBER, plain_digits

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
    """Return the last number with ASCII digits and without its thousands separators; None without one."""
    numbers = [found[0] for found in NUMBER.finditer(plain_digits(text))]
    return re.sub(r"(?<=\d)(?:,|\{,\}|_)(?=\d)", "", numbers[-1]) if numbers else None


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
