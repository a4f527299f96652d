"""Problems that only the tokenizer and the data can show: prompts, turns and stop tokens, before anything starts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.config.tasks import ChainedArithmeticTask, JsonlTask
from megatron_rl.errors import MegatronRLError
from megatron_rl.launch.planning.model_sizes import ModelSizes
from megatron_rl.tasks.jsonl import check_files
from megatron_rl.tasks.sample import PromptSample, sample_prompts
from megatron_rl.tasks.turn_format import TemplateTurns, TurnTokenizer, find_turn_format

MANY_TOO_LONG = 0.5
"""Fraction of prompts above ``task.max_prompt_tokens`` that is probably a mistake."""


@dataclass
class Inspection:
    """What was found.

    Attributes:
        running: problems with which a run would end.
        learning: problems with which a run would learn nothing.
        warnings: what works and is probably a mistake.
        facts: what was looked at.
    """

    running: list[str] = field(default_factory=list)
    learning: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)


def inspect_inputs(loaded: Loaded[Run], sizes: ModelSizes | None, *, full: bool = False) -> Inspection:
    """Build the tokenizer, read the data files to their end, and render and tokenize prompts.

    Args:
        loaded: the configuration.
        sizes: the model's sizes; None if it cannot be read.
        full: whether to tokenize all prompts instead of a sample.
    """
    from megatron_rl.models.tokenizers import open_tokenizer, stop_tokens  # transformers takes a second to import

    run, inspection = loaded.run, Inspection()
    folder = Path(run.model.path)
    if sizes is None:  # without a readable config.json; that problem is reported
        inspection.running += check_files(run.task) if isinstance(run.task, JsonlTask) else ()
        return inspection
    try:
        tokenizer = open_tokenizer(folder, trust_code=run.model.trust_code)
        stops = {*stop_tokens(folder, tokenizer), *run.rollout.sampling.stop_token_ids}
    except MegatronRLError as error:
        inspection.running.append(str(error))
        inspection.running += check_files(run.task) if isinstance(run.task, JsonlTask) else ()
        return inspection
    model_stops = stops - {*run.rollout.sampling.stop_token_ids}
    inspection.running += [
        f"{loaded.describe('model.path')}: token {token} ends a response, but the vocabulary of the model has"
        f" {sizes.vocabulary} tokens; correct eos_token_id of its config.json, generation_config.json or tokenizer"
        for token in sorted(model_stops)
        if token >= sizes.vocabulary
    ]
    if not stops:
        inspection.learning.append(
            f"{loaded.describe('model.path')} names no token that ends a response, so every response would be"
            " truncated, and wrong; write eos_token_id in its generation_config.json, or"
            " rollout.sampling.stop_token_ids"
        )
    if run.environment.name:
        _inspect_turns(loaded, tokenizer, sorted(stops), inspection)
    sample = sample_prompts(run.task, tokenizer, run.train.seed, full=full)
    inspection.running += sample.problems
    if not sample.problems:
        inspection.running += _split_problems(loaded, sample)
    inspection.running += _vocabulary_problems(sample, sizes.vocabulary)
    inspection.warnings += _prompt_warnings(loaded, sample, tokenizer.unk_token_id)
    inspection.warnings += _template_warnings(loaded, tokenizer.chat_template)
    inspection.facts += _describe(sample, full)
    return inspection


def _inspect_turns(
    loaded: Loaded[Run], tokenizer: TurnTokenizer, stop_ids: Sequence[int], inspection: Inspection
) -> None:
    """Render an invented conversation as the run would, and compare it with the chat template's rendering."""
    try:
        turns = find_turn_format(loaded.run.task, loaded.run.environment, stop_ids, tokenizer)
    except MegatronRLError as error:
        inspection.running.append(str(error))
        return
    if isinstance(turns, TemplateTurns):
        inspection.facts.append("an invented conversation of several turns is trained as the chat template renders it")
        if "</think>" in str(getattr(tokenizer, "chat_template", "")) and turns.rewrites_thoughts:
            inspection.warnings.append(
                f"{loaded.describe('environment.role')}: the chat template changes turns with <think>...</think>"
                " when another turn follows; if the model writes them, its own later turns see the text as sampled, and"
                " a server with this template would show it another one"
            )


def _split_problems(loaded: Loaded[Run], sample: PromptSample) -> Iterator[str]:
    run, task = loaded.run, loaded.run.task
    if not isinstance(task, JsonlTask):
        return
    if not sample.total["train"]:
        yield f"no prompt to train on in {task.path}: all are held out; write more rows, or lower task.heldout_fraction"
    if run.evaluate.every and not sample.total["heldout"] and (task.heldout_path or task.heldout_fraction):
        yield (
            f"{loaded.describe('evaluate.every')}, but of {sample.total['train']} prompts none is held out; set"
            " task.heldout_path, raise task.heldout_fraction, or write evaluate.every = 0"
        )
    longest = task.max_prompt_tokens
    if sample.prompts and all(len(prompt.input_ids) > longest for _, prompt in sample.prompts):
        shortest = min(len(prompt.input_ids) for _, prompt in sample.prompts)
        yield (
            f"{loaded.describe('task.max_prompt_tokens')}: all {len(sample.prompts)} prompts looked at are longer, the"
            f" shortest has {shortest} tokens; write a larger number"
        )


def _vocabulary_problems(sample: PromptSample, vocabulary: int) -> Iterator[str]:
    for place, prompt in sample.prompts:
        if (largest := max(prompt.input_ids)) >= vocabulary:
            yield (
                f"the tokenizer makes token {largest} of a prompt ({place}), but the model's vocabulary has"
                f" {vocabulary} tokens; use the tokenizer that belongs to the model"
            )
            return


def _prompt_warnings(loaded: Loaded[Run], sample: PromptSample, unknown: int | None) -> Iterator[str]:
    task = loaded.run.task
    longest = None if isinstance(task, ChainedArithmeticTask) else task.max_prompt_tokens
    too_long = [place for place, prompt in sample.prompts if longest and len(prompt.input_ids) > longest]
    if len(sample.prompts) > len(too_long) > MANY_TOO_LONG * len(sample.prompts):
        yield (
            f"{loaded.describe('task.max_prompt_tokens')}: {len(too_long)} of {len(sample.prompts)} prompts looked at"
            f" are longer and would be left out, the first at {too_long[0]}"
        )
    for place, prompt in sample.prompts:
        if unknown is not None and unknown in prompt.input_ids:
            yield (
                f"the tokenizer has no token for a part of a prompt ({place}) and writes its unknown token instead: the"
                " model cannot read it"
            )
            return


def _template_warnings(loaded: Loaded[Run], template: object) -> Iterator[str]:
    task = loaded.run.task
    if isinstance(task, ChainedArithmeticTask) or not task.chat_template:
        return
    if "strftime_now" in str(template):
        yield (
            f"{loaded.describe('task.chat_template')}: the template writes today's date, so prompts change from day to"
            " day, also in a resumed run; write the date that it shall show in task.template, if it has such a variable"
        )


def _describe(sample: PromptSample, full: bool) -> Iterator[str]:
    if sample.prompts:
        lengths = sorted(len(prompt.input_ids) for _, prompt in sample.prompts)
        total = sum(sample.total.values())
        of_all = f" of {total}" if total and not full else ""
        yield (
            f"{len(lengths)}{of_all} prompts were rendered and tokenized: {lengths[0]} to {lengths[-1]} tokens, median"
            f" {lengths[len(lengths) // 2]}"
        )
