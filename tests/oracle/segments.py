"""Segmentation once more, slowly: strings instead of tables."""

from collections.abc import Sequence

from megatron_rl.data.vocabulary import CLOSERS, DELIMITERS, Granularity


def sentences(
    runs: Sequence[Sequence[bytes]], granularity: Granularity, min_tokens: int = 1, end: bytes = b"<end>"
) -> list[int]:
    """Return the segment of each token; a run is a stretch of trained tokens without a gap."""
    ids, segment = [], 0
    for pieces in runs:
        length = 0
        for t in range(len(pieces)):
            ids.append(segment)
            length += 1
            last = t == len(pieces) - 1
            if last or (closes(pieces, t, granularity, end) and length >= min_tokens):
                segment, length = segment + 1, 0
    return ids


def closes(pieces: Sequence[bytes], t: int, granularity: Granularity, end: bytes) -> bool:
    """Whether token t (not the last) closes a segment."""
    if pieces[t] == end or pieces[t + 1] == end:
        return False
    before = b"".join(b"" if piece == end else piece for piece in pieces[:t])
    whole = characters(before + pieces[t])
    text = "".join(character for character, last_byte in whole if last_byte >= len(before))
    if "\n" in text:
        return True
    stripped = text.rstrip(CLOSERS)
    if not stripped or stripped[-1] not in DELIMITERS[granularity]:
        return False
    if text[-1] in ".,":
        stream = "".join(character for character, _ in whole)
        following = pieces[t + 1].decode("utf-8", "replace") if pieces[t + 1] != end else ""
        follows_end = len(text) == 1 and t > 0 and pieces[t - 1] == end
        if stream[-2:-1].isdecimal() and following[:1].isdecimal() and not follows_end:
            return False
    return True


def characters(data: bytes) -> list[tuple[str, int]]:
    """Return each character with the index of its last byte; what is no UTF-8 becomes one U+FFFD a byte."""
    found, i = [], 0
    while i < len(data):
        for size in (1, 2, 3, 4):
            try:
                found.append((data[i : i + size].decode(), min(i + size, len(data)) - 1))
                i += size
                break
            except UnicodeDecodeError:
                continue
        else:
            found.append(("\ufffd", i))
            i += 1
    return found
