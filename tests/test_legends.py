"""Suffixes of tensors mean the same everywhere: legends agree with the table in CONTRIBUTING.md."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORDS = {
    "T": "token|position",
    "R": "trained",
    "G": "segments",
    "B": "responses|sequences",
    "P": "prompts",
    "V": "vocabulary",
    "H": "hidden",
    "L": "layers",
    "E": "experts",
    "K": "experts per token",
    "N": "",
}
"""Letter -> a word of its meaning. N has none: it is any one dimension of a helper function."""


def table() -> dict[str, str]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return dict(re.findall(r"^\| `_([A-Z])` \| (.*?) \|$", text, re.MULTILINE))


def legends() -> dict[str, dict[str, str]]:
    """Return letter -> meaning of every legend, by module."""
    found: dict[str, dict[str, str]] = {}
    for path in (ROOT / "megatron_rl").rglob("*.py"):
        if match := re.search(r"Legend: (.*?)(?:\n\n|\"\"\")", path.read_text(), re.DOTALL):
            text = " ".join(match[1].split())
            parts = re.split(r"(?:^|(?<=[,;] )|(?<=and ))(?=[A-Z] [a-z])", text)
            found[str(path.relative_to(ROOT))] = {part[0]: part[2:] for part in parts if re.match(r"[A-Z] [a-z]", part)}
    return found


def test_the_table_has_the_letters_that_legends_are_compared_with():
    rows = table()
    assert rows.keys() == WORDS.keys()
    assert [letter for letter, word in WORDS.items() if not re.search(word, rows[letter])] == []


def test_legends_agree_with_the_table():
    found = legends()
    assert len(found) > 30
    assert [
        f"{module}: {letter} {meaning}"
        for module, letters in found.items()
        for letter, meaning in letters.items()
        if not re.search(WORDS.get(letter, ""), meaning)
    ] == []
