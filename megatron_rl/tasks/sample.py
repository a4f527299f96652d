"""Prompts of a task that are rendered and tokenized before a run starts, to find those that would end it later."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rl.config.tasks import AnyTask, JsonlTask
from megatron_rl.data.types import Prompt
from megatron_rl.errors import MegatronRLError
from megatron_rl.tasks import make_task
from megatron_rl.tasks.base import Split, Tokenizer, in_heldout_split
from megatron_rl.tasks.jsonl import PromptRow, prompt_of, read_prompt_rows
from megatron_rl.tasks.render import PromptRenderer

SAMPLED_ROWS = 64
"""Rows of each file, in addition to its longest and its shortest."""

GENERATED_PROMPTS = 8
"""Prompts of each split of a task that generates them."""

SHOWN_PROBLEMS = 5


@dataclass
class PromptSample:
    """Rendered prompts, and what went wrong.

    Attributes:
        prompts: where each prompt comes from, such as ``data.jsonl:17``, and the prompt.
        problems: why the task cannot be used.
        total: number of prompts of each split of a task with files, as far as they can be read.
    """

    prompts: list[tuple[str, Prompt]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    total: dict[Split, int] = field(default_factory=dict)


def sample_prompts(options: AnyTask, tokenizer: Tokenizer, seed: int, *, full: bool = False) -> PromptSample:
    """Return prompts of both splits: a sample of the rows of files, which are read to their end, or with ``full`` all.

    Tasks that generate prompts give the first of each split.
    """
    sample = PromptSample()
    try:
        if isinstance(options, JsonlTask):
            renderer = PromptRenderer(options, tokenizer)
            _sample_files(options, sample, lambda row: prompt_of(row, options, renderer), full)
        else:
            task = make_task(options, tokenizer)
            for split in ("train", "heldout"):
                source = task.prompts(split, seed)
                sample.prompts += [(f"prompt {i} of {split}", source[i]) for i in range(GENERATED_PROMPTS)]
    except MegatronRLError as error:
        sample.problems.append(str(error))
    return sample


def _sample_files(options: JsonlTask, sample: PromptSample, render: Callable[[PromptRow], Prompt], full: bool) -> None:
    sample.total = {"train": 0, "heldout": 0}
    count, left_out = 0, 0
    for path in (options.path, options.heldout_path):
        try:
            rows = iter(()) if path is None else _count(options, path, sample)
            for row in rows if full else _selected(rows):
                count += 1
                try:
                    sample.prompts.append((str(row.location), render(row)))
                except MegatronRLError as error:
                    left_out += 1
                    if left_out <= SHOWN_PROBLEMS:
                        sample.problems.append(str(error))
        except MegatronRLError as error:
            sample.problems.append(str(error))
    if left_out > SHOWN_PROBLEMS:
        sample.problems.append(f"{left_out} of {count} prompts looked at cannot be used; the first are named here")


def _count(options: JsonlTask, path: str, sample: PromptSample) -> Iterator[PromptRow]:
    """Yield the rows of a file; at its end their number is in ``sample.total``."""
    rows = 0
    for row in read_prompt_rows(options, Path(path)):
        rows += 1
        is_heldout = path == options.heldout_path or (
            options.heldout_path is None and in_heldout_split(row.text, options.heldout_fraction)
        )
        sample.total["heldout" if is_heldout else "train"] += 1
        yield row
    if not rows:
        sample.problems.append(f"no row in {path}; write one JSON object per line, or one row per prompt")


def _selected(rows: Iterator[PromptRow]) -> Iterator[PromptRow]:
    """Yield some rows in their order: the first, the longest, the shortest, and a random sample, always the same."""
    chosen: dict[int, PromptRow] = {}
    ends: dict[str, tuple[int, PromptRow]] = {}
    generator = random.Random(0)
    slots: list[int] = []
    for index, row in enumerate(rows):
        for name, better in (
            ("first", not ends),
            ("longest", "longest" not in ends or len(row.text) > len(ends["longest"][1].text)),
            ("shortest", "shortest" not in ends or len(row.text) < len(ends["shortest"][1].text)),
        ):
            if better:
                ends[name] = (index, row)
        slot = index if index < SAMPLED_ROWS else generator.randrange(index + 1)
        if slot < len(slots):
            del chosen[slots[slot]]
            slots[slot] = index
            chosen[index] = row
        elif slot < SAMPLED_ROWS:
            slots.append(index)
            chosen[index] = row
    chosen |= dict(ends.values())
    for index in sorted(chosen):
        yield chosen[index]
