"""Prompts and answers from a file with one JSON object a line, from Parquet, or from a folder of Hugging Face datasets.

Read and checked before any work starts.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from megatron_rl.config.tasks import JsonlTask, Reward
from megatron_rl.data.prompts import Shuffled
from megatron_rl.data.types import Prompt, Response, fold_seed
from megatron_rl.errors import DataError, MegatronRLError
from megatron_rl.tasks.base import Split, Tokenizer, Verdict
from megatron_rl.tasks.render import render
from megatron_rl.tasks.reward import find_verifier, require_stop
from megatron_rl.tasks.rows import RowLocation, read_rows
from megatron_rl.tasks.verifiers import VERIFIERS

logger = logging.getLogger(__name__)


Turns = list[dict[str, str]]
"""A conversation: turns with ``role`` and ``content``."""

LABELS = ("task", "difficulty")
"""Columns that go into ``Prompt.metadata`` where a row has them: evaluations are told apart by them."""


@dataclass(frozen=True)
class PromptRow:
    """One row of a file."""

    place: RowLocation
    prompt: str | Turns
    answer: str
    labels: Mapping[str, str]

    @property
    def text(self) -> str:
        """The prompt as text; of a conversation all that is said."""
        return self.prompt if isinstance(self.prompt, str) else "\n".join(turn["content"] for turn in self.prompt)


def read_prompt_rows(options: JsonlTask, path: Path) -> Iterator[PromptRow]:
    """Yield the rows of a file; a DataError names file and line of the first one that cannot be used."""
    for place, row in read_rows(options.name, path):
        prompt, answer = (
            _field(row, name, option, place)
            for option, name in (("prompt_field", options.prompt_field), ("answer_field", options.answer_field))
        )
        if not (isinstance(prompt, str) and prompt) and not _is_conversation(prompt):
            raise DataError(
                f"{options.prompt_field} is {_show(prompt)} ({place}); write a string that is not empty, or a list of"
                " turns with role and content"
            )
        if not isinstance(prompt, str) and not options.chat_template:
            raise DataError(f"{options.prompt_field} is a list of turns ({place}); set task.chat_template = true")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise DataError(f"{options.answer_field} is {_show(answer)} ({place}); write a string or a number")
        labels = {name: str(row[name]) for name in LABELS if isinstance(row.get(name), str | int | float)}
        yield PromptRow(place, cast(str | Turns, prompt), str(answer), labels)


def _field(row: Mapping[str, object], name: str, option: str, place: RowLocation) -> object:
    """Return a field of a row; ``a.b`` is b within a, unless there is a field of that whole name."""
    here: object = row
    for part in (name,) if name in row else name.split("."):
        if not isinstance(here, Mapping) or part not in here:
            found = ", ".join(row) or "nothing"
            raise DataError(f"no field {name!r} ({place}); it has {found}: correct the line, or set task.{option}")
        here = here[part]
    return here


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
    """Yield what is wrong with the files of a task, the first bad line of each, without a tokenizer."""
    for path in (options.path, options.heldout_path):
        try:
            if path is not None and not any([*read_prompt_rows(options, Path(path))]):
                yield f"no line in {path}; write one JSON object a line, or one row each"
        except MegatronRLError as error:
            yield str(error)


class Jsonl:
    """The task. Prompts are tokenised once, when the task is made."""

    def __init__(self, options: JsonlTask, tokenizer: Tokenizer) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.check = require_stop(find_verifier(options.verifier, Reward()))
        self.too_long = 0
        """Prompts left out because they have more tokens than ``max_prompt_tokens``."""
        path = Path(options.path)
        records = list(read_prompt_rows(options, path))
        if options.heldout_path is not None:
            train, heldout_file = records, Path(options.heldout_path)
            heldout = list(read_prompt_rows(options, heldout_file))
        else:
            heldout_file = path
            train = [r for r in records if _share(r.text) >= options.heldout_fraction]
            heldout = [r for r in records if _share(r.text) < options.heldout_fraction]
        self.splits: dict[Split, list[Prompt]] = {
            "train": self._tokenise(train),
            "heldout": self._tokenise(heldout),
        }
        if not self.splits["train"]:
            raise DataError(
                f"no prompt to train on in {path} ({len(records)} lines, {self.too_long} prompts longer than"
                f" {options.max_prompt_tokens} tokens, {len(heldout)} held out); write more lines, raise"
                " task.max_prompt_tokens or lower task.heldout_fraction"
            )
        if self.too_long:
            logger.warning(
                "%d prompts have more than %d tokens and are left out", self.too_long, options.max_prompt_tokens
            )

    def prompts(self, split: Split, seed: int) -> Shuffled:
        """Return the prompts of a split, shuffled by the seed, epoch after epoch."""
        if not self.splits[split]:
            raise DataError(
                f"no held-out prompt in {self.options.heldout_path or self.options.path};"
                " set task.heldout_path, raise task.heldout_fraction, or set evaluate.every = 0"
            )
        return Shuffled(self.splits[split], seed)

    def verify(self, prompt: Prompt, response: Response) -> Verdict:
        """Judge the text of a response, here and without a time limit; one that did not end is wrong."""
        return self.check(prompt, response)

    def _tokenise(self, records: list[PromptRow]) -> list[Prompt]:
        prompts = []
        for record in records:
            self._check_answer(record)
            text, ids = render(record.prompt, self.options, self.tokenizer)
            if len(ids) > self.options.max_prompt_tokens:
                self.too_long += 1
                continue
            name = f"{record.place.name}:{record.place.number}"
            prompts.append(Prompt(name, ids, text, record.answer, record.labels))
        return prompts

    def _check_answer(self, record: PromptRow) -> None:
        """Let a verifier of ours say now, not in the middle of a run, that it cannot work with an answer."""
        if self.options.verifier in ("number", "regex"):
            try:
                VERIFIERS[self.options.verifier](record.text, "", record.answer)
            except DataError as error:
                raise DataError(f"{error} ({record.place})") from error


def _share(prompt: str) -> float:
    """Return a number in [0, 1) that depends on the text only: the same prompt is always in the same split."""
    return fold_seed((int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big"),)) / 2**63
