"""Prompts and answers from a file with one JSON object per line, a Parquet file, or a folder of Hugging Face datasets.

The files are read and checked before any work starts.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from megatron_rl.config.tasks import JsonlTask, Reward
from megatron_rl.data.prompts import Shuffled
from megatron_rl.data.types import Prompt, Response
from megatron_rl.errors import DataError, MegatronRLError
from megatron_rl.tasks.base import Split, Tokenizer, Verdict, in_heldout_split
from megatron_rl.tasks.render import PromptRenderer, Turns
from megatron_rl.tasks.reward import find_verifier, require_stop
from megatron_rl.tasks.rows import RowLocation, read_rows
from megatron_rl.tasks.verifiers import VERIFIERS

logger = logging.getLogger(__name__)


LABELS = ("task", "difficulty")
"""Optional columns that are copied to ``Prompt.metadata``; evaluation reports results for each of their values."""


@dataclass(frozen=True)
class PromptRow:
    """One row of a prompt file."""

    location: RowLocation
    prompt: str | Turns
    answer: str
    labels: Mapping[str, str]

    @property
    def text(self) -> str:
        """The prompt as text: for a conversation, the contents of all turns, one per line."""
        return self.prompt if isinstance(self.prompt, str) else "\n".join(turn["content"] for turn in self.prompt)


def read_prompt_rows(options: JsonlTask, path: Path) -> Iterator[PromptRow]:
    """Yield the rows of a prompt file.

    Raises:
        DataError: a row cannot be used; the message names its file and line.
    """
    for location, row in read_rows(options.name, path):
        prompt, answer = (
            _field(row, name, option, location)
            for option, name in (("prompt_field", options.prompt_field), ("answer_field", options.answer_field))
        )
        if not (isinstance(prompt, str) and prompt) and not _is_conversation(prompt):
            raise DataError(
                f"{options.prompt_field} is {_show(prompt)} ({location}); write a nonempty string, or a list of"
                " turns with role and content"
            )
        if not isinstance(prompt, str) and not options.chat_template:
            raise DataError(f"{options.prompt_field} is a list of turns ({location}); set task.chat_template = true")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise DataError(f"{options.answer_field} is {_show(answer)} ({location}); write a string or a number")
        labels = {name: str(row[name]) for name in LABELS if isinstance(row.get(name), str | int | float)}
        found = PromptRow(location, cast(str | Turns, prompt), str(answer), labels)
        _check_characters(found)
        yield found


def _check_characters(row: PromptRow) -> None:
    """Raise DataError if a text has half of a surrogate pair, which no file can hold and no tokenizer encodes."""
    roles = [] if isinstance(row.prompt, str) else [turn["role"] for turn in row.prompt]
    for text in (row.text, row.answer, *roles, *row.labels.values()):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"half of a surrogate pair, \\u{ord(text[error.start]):04x}, at character {error.start + 1} of a text"
                f" ({row.location}): the text was cut inside a character; remove it, or write the whole character"
            ) from error


def _field(row: Mapping[str, object], name: str, option: str, location: RowLocation) -> object:
    """Return a field of a row. ``a.b`` is field b of field a, unless there is a field with the name ``a.b``."""
    value: object = row
    for part in (name,) if name in row else name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            fields = ", ".join(row) or "none"
            raise DataError(f"no field {name!r} ({location}); its fields: {fields}; correct it, or set task.{option}")
        value = value[part]
    return value


def _is_conversation(prompt: object) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(turn, dict) and {*turn} >= {"role", "content"} for turn in prompt)
        and all(isinstance(turn["role"], str) and isinstance(turn["content"], str) for turn in prompt)
    )


def _show(value: object) -> str:
    return json.dumps(value, default=str)[:80]


def check_files(options: JsonlTask) -> Iterator[str]:
    """Yield the problems of the files of a task, the first bad line of each. Needs no tokenizer."""
    for path in (options.path, options.heldout_path):
        try:
            if path is not None and not any([*read_prompt_rows(options, Path(path))]):
                yield f"no row in {path}; write one JSON object per line, or one row per prompt"
        except MegatronRLError as error:
            yield str(error)


class Jsonl:
    """A task whose prompts and answers come from files. Prompts are tokenized once, by the constructor."""

    def __init__(self, options: JsonlTask, tokenizer: Tokenizer) -> None:
        self.options = options
        self._renderer = PromptRenderer(options, tokenizer)
        self._verify = require_stop(find_verifier(options.verifier, Reward()))
        self.too_long = 0
        """Number of prompts that were left out because they have more than ``max_prompt_tokens`` tokens."""
        path = Path(options.path)
        rows = list(read_prompt_rows(options, path))
        if options.heldout_path is not None:
            train, heldout = rows, list(read_prompt_rows(options, Path(options.heldout_path)))
        else:
            heldout = [row for row in rows if in_heldout_split(row.text, options.heldout_fraction)]
            train = [row for row in rows if not in_heldout_split(row.text, options.heldout_fraction)]
        self.splits: dict[Split, list[Prompt]] = {
            "train": self._tokenize(train),
            "heldout": self._tokenize(heldout),
        }
        if not self.splits["train"]:
            raise DataError(
                f"no prompt to train on in {path} ({len(rows)} lines, {self.too_long} prompts longer than"
                f" {options.max_prompt_tokens} tokens, {len(heldout)} held out); write more lines, raise"
                " task.max_prompt_tokens or lower task.heldout_fraction"
            )
        if self.too_long:
            logger.warning(
                "%d prompts have more than %d tokens and are left out", self.too_long, options.max_prompt_tokens
            )

    def prompts(self, split: Split, seed: int) -> Shuffled:
        """Return the prompts of a split, shuffled anew by the seed in each epoch."""
        if not self.splits[split]:
            raise DataError(
                f"no held-out prompt in {self.options.heldout_path or self.options.path};"
                " set task.heldout_path, raise task.heldout_fraction, or set evaluate.every = 0"
            )
        return Shuffled(self.splits[split], seed)

    def verify(self, prompt: Prompt, response: Response) -> Verdict:
        """Verify a response in this process, without a time limit. A response that did not end is wrong."""
        return self._verify(prompt, response)

    def _tokenize(self, rows: list[PromptRow]) -> list[Prompt]:
        prompts = []
        for row in rows:
            prompt = prompt_of(row, self.options, self._renderer)
            if len(prompt.input_ids) > self.options.max_prompt_tokens:
                self.too_long += 1
                continue
            prompts.append(prompt)
        return prompts


def prompt_of(row: PromptRow, options: JsonlTask, renderer: PromptRenderer) -> Prompt:
    """Return the prompt of a row.

    Raises:
        DataError: it cannot be rendered, or the verifier cannot use the answer; the message names file and line.
    """
    try:
        if options.verifier in ("number", "regex"):
            VERIFIERS[options.verifier](row.text, "", row.answer)
        text, ids = renderer.render(row.prompt)
    except DataError as error:
        raise DataError(f"{error} ({row.location})") from error
    return Prompt(f"{row.location.name}:{row.location.number}", ids, text, row.answer, row.labels)
