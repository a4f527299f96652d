"""Prompts and answers from a file with one JSON object a line, read and checked before any work starts."""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.tasks import JsonlTask, Reward
from megatron_rl.data.prompts import Shuffled
from megatron_rl.data.types import Prompt, Response, fold_seed
from megatron_rl.errors import DataError
from megatron_rl.tasks.base import Split, Tokenizer, Verdict
from megatron_rl.tasks.judge import ended, find_check
from megatron_rl.tasks.render import render
from megatron_rl.tasks.verifiers import VERIFIERS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One line of a file."""

    line: int
    prompt: str
    answer: str


def read_records(path: Path, prompt_field: str, answer_field: str) -> Iterator[Record]:
    """Yield the lines of a file; a DataError names file and line of the first one that cannot be used."""
    if not path.is_file():
        raise DataError(f"no such file: {path} (task.path or task.heldout_path); write the path of a JSONL file")
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if raw.strip():
                yield _record(raw, f"{path}:{number}", number, prompt_field, answer_field)


def _record(raw: bytes, place: str, line: int, prompt_field: str, answer_field: str) -> Record:
    try:
        row = json.loads(raw)
    except ValueError as error:
        raise DataError(f"not JSON: {_cut(raw)} ({place}): {error}; write one JSON object a line") from error
    if not isinstance(row, dict):
        raise DataError(
            f"not a JSON object: {_cut(raw)} ({place}); write {{...}} with {prompt_field} and {answer_field}"
        )
    for option, name in (("prompt_field", prompt_field), ("answer_field", answer_field)):
        if name not in row:
            found = ", ".join(row) or "nothing"
            raise DataError(f"no field {name!r} ({place}); it has {found}: correct the line, or set task.{option}")
    prompt, answer = row[prompt_field], row[answer_field]
    if not isinstance(prompt, str) or not prompt:
        raise DataError(f"{prompt_field} is {json.dumps(prompt)[:80]} ({place}); write a string that is not empty")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise DataError(f"{answer_field} is {json.dumps(answer)[:80]} ({place}); write a string or a number")
    return Record(line, prompt, str(answer))


def _cut(raw: bytes) -> str:
    text = raw.decode(errors="replace").strip()
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_files(options: JsonlTask) -> Iterator[str]:
    """Yield what is wrong with the files of a task, the first bad line of each, without a tokenizer."""
    for path in (options.path, options.heldout_path):
        try:
            if path is not None and not any([*read_records(Path(path), options.prompt_field, options.answer_field)]):
                yield f"no line in {path}; write one JSON object a line"
        except DataError as error:
            yield str(error)


class Jsonl:
    """The task. Prompts are tokenised once, when the task is made."""

    def __init__(self, options: JsonlTask, tokenizer: Tokenizer) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.check = ended(find_check(options.verifier, Reward()))
        self.too_long = 0
        """Prompts left out because they have more tokens than ``max_prompt_tokens``."""
        path = Path(options.path)
        records = list(read_records(path, options.prompt_field, options.answer_field))
        if options.heldout_path is not None:
            train, heldout_file = records, Path(options.heldout_path)
            heldout = list(read_records(heldout_file, options.prompt_field, options.answer_field))
        else:
            heldout_file = path
            train = [r for r in records if _share(r.prompt) >= options.heldout_fraction]
            heldout = [r for r in records if _share(r.prompt) < options.heldout_fraction]
        self.splits: dict[Split, list[Prompt]] = {
            "train": self._tokenise(path, train),
            "heldout": self._tokenise(heldout_file, heldout),
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

    def _tokenise(self, path: Path, records: list[Record]) -> list[Prompt]:
        prompts = []
        for record in records:
            self._check_answer(path, record)
            text, ids = render(record.prompt, self.options, self.tokenizer)
            if len(ids) > self.options.max_prompt_tokens:
                self.too_long += 1
                continue
            prompts.append(Prompt(f"{path.name}:{record.line}", ids, text, record.answer))
        return prompts

    def _check_answer(self, path: Path, record: Record) -> None:
        """Let a verifier of ours say now, not in the middle of a run, that it cannot work with an answer."""
        if self.options.verifier in ("number", "regex"):
            try:
                VERIFIERS[self.options.verifier](record.prompt, "", record.answer)
            except DataError as error:
                raise DataError(f"{error} ({path}:{record.line})") from error


def _share(prompt: str) -> float:
    """Return a number in [0, 1) that depends on the text only: the same prompt is always in the same split."""
    return fold_seed((int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big"),)) / 2**63
