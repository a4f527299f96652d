"""Fenced code blocks of a response, as CommonMark delimits them, and as models write them.

A fence is three or more backticks or tildes. Its block ends at a fence of the same character that is at least as long,
or with the text. The fences may be indented, may have Windows line ends, and the first may follow text on its line.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_OPENING = re.compile(r"^(?P<before>(?:(?!```|~~~).)*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`]*)$")
_PYTHON = re.compile(r"(?:i?python|py)[\d.]*", re.IGNORECASE)


@dataclass(frozen=True)
class CodeBlock:
    """The text of a block, and the first word after its fence, without braces and dots (``{.python}``)."""

    language: str
    text: str

    @property
    def is_python(self) -> bool:
        """Whether the block is Python, or may be: its fence names no language."""
        return not self.language or _PYTHON.fullmatch(self.language) is not None


def code_blocks(text: str) -> Iterator[CodeBlock]:
    """Yield the fenced blocks of a text in order."""
    lines = iter(text.replace("\r\n", "\n").split("\n"))
    for line in lines:
        opening = _OPENING.match(line)
        if opening is None or (opening["before"].strip() and len(opening["info"].split()) > 1):
            continue  # no fence, or one that a sentence mentions
        words = re.split(r"[\s{},;:=]+", opening["info"].strip(" \t{.\r"))
        indent = 0 if opening["before"].strip() else len(opening["before"])
        content = "".join(_content(lines, opening["fence"], indent))
        yield CodeBlock(words[0].strip("."), content)


def _content(lines: Iterator[str], fence: str, indent: int) -> Iterator[str]:
    """Yield the lines of a block, without the indentation of its fence, and consume the line that closes it."""
    closing = re.compile(rf"(?P<before>[^`'\"]*?){re.escape(fence[0])}{{{len(fence)},}}[ \t\r]*")
    for line in lines:
        line = line.lstrip(" \t") if line[:indent].strip() else line[indent:]
        if found := closing.fullmatch(line):
            if found["before"].strip():
                yield found["before"] + "\n"
            return
        yield line + "\n"
