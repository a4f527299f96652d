"""One reasoning-gym task or a mixture of several: prompts by position, scored by reasoning-gym.

    position --> entry of the mixture (by weight) --> block of questions (one seed) --> question --> split by its text

A question is a function of (seed, position), so the process that scores a response generates the question again.
"""

import importlib.util
import logging
import os
from bisect import bisect
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from itertools import accumulate
from typing import Any, Protocol, cast

from megatron_rl.config.tasks import MixtureTask, ReasoningGymTask
from megatron_rl.data.prompts import Generated
from megatron_rl.data.types import Prompt, Response, fold_seed
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.tasks.base import Split, Tokenizer, Verdict, in_heldout_split, text_hash, unfinished
from megatron_rl.tasks.extract import EXTRACTORS
from megatron_rl.tasks.render import PromptRenderer

logger = logging.getLogger(__name__)

BLOCK_SIZE = 64
"""Questions per reasoning-gym dataset, which has one seed. Some datasets generate all questions in the constructor."""

MAX_ATTEMPTS = 1000
"""Questions to try per position until one belongs to the split and is short enough."""

HASH_SEED_DEPENDENT = frozenset(
    {
        *("acre", "isomorphic_strings", "knight_swap", "list_functions"),
        *("polynomial_multiplication", "ransom_note", "word_ladder"),
    }
)
"""Tasks of reasoning-gym 0.1.25 that iterate over sets of strings: their questions also depend on PYTHONHASHSEED."""

Entry = Mapping[str, Any]
"""A reasoning-gym question: ``question``, ``answer``, ``metadata``."""


class Dataset(Protocol):
    """The part of the interface of reasoning-gym datasets that this module uses."""

    def __getitem__(self, index: int) -> Entry: ...

    def score_answer(self, answer: str | None, entry: Entry) -> float:
        """Return 1 for a right answer, less for other answers."""
        ...


def check_gym(options: ReasoningGymTask) -> Iterator[str]:
    """Yield the problems of a mixture: missing package, unknown tasks, invalid options."""
    if importlib.util.find_spec("reasoning_gym") is None:
        yield (
            'task.name = "reasoning_gym" needs the package reasoning-gym, which is not installed; pip install'
            " 'megatron-rl[tasks]'"
        )
        return
    for label in options.mixture:
        try:
            MixtureDatasets(options).block(label, 0)[0]
        except ConfigError as error:
            yield str(error)


class MixtureDatasets:
    """The datasets of a mixture, created on demand."""

    def __init__(self, options: ReasoningGymTask) -> None:
        self.mixture = options.mixture
        self.block = lru_cache(maxsize=256)(self._block)

    def dataset_name(self, label: str) -> str:
        """Return the reasoning-gym task of an entry of the mixture."""
        return self.mixture[label].dataset or label

    def entry(self, source: str) -> tuple[Dataset, Entry]:
        """Return the question of a prompt, given its metadata entry ``source``, and the dataset that scores it."""
        label, seed, offset = source.rsplit(":", 2)
        dataset = self.block(label, int(seed))
        return dataset, dataset[int(offset)]

    def _block(self, label: str, seed: int) -> Dataset:
        from reasoning_gym.factory import DATASETS, create_dataset

        name, component = self.dataset_name(label), self.mixture[label]
        if name not in DATASETS or name == "composite":
            close = get_close_matches(name, DATASETS, 1)
            hint = f"did you mean {close[0]}?" if close else "reasoning_gym.factory.DATASETS has the names"
            raise ConfigError(f"no such task of reasoning-gym: {name!r} (task.mixture.{label}); {hint}")
        options = {**_level_options(name, label, component), **component.options, "seed": seed, "size": BLOCK_SIZE}
        known = DATASETS[name][1].__dataclass_fields__
        for option in options:
            if option not in known or option in component.options.keys() & {"seed", "size"}:
                raise ConfigError(
                    f"unknown option {option!r} of reasoning-gym's {name} (task.mixture.{label}.options); its options:"
                    f" {', '.join(sorted(set(known) - {'seed', 'size'}))}"
                )
        try:
            return cast(Dataset, create_dataset(name, **options))
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(
                f"reasoning-gym's {name} rejects {dict(component.options)}, level {component.level}"
                f" (task.mixture.{label}): {error or type(error).__name__}"
            ) from error


def _level_options(name: str, label: str, component: MixtureTask) -> Mapping[str, object]:
    """Return the dataset options of a curriculum level."""
    if component.level is None:
        return {}
    from reasoning_gym.factory import CURRICULA, create_curriculum

    if name not in CURRICULA:
        raise ConfigError(f"reasoning-gym's {name} has no levels (task.mixture.{label}.level); set options instead")
    curriculum = create_curriculum(name)
    highest = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
    if component.level > highest:
        raise ConfigError(f"task.mixture.{label}.level = {component.level}; {name} has levels 0 to {highest}")
    for attribute in curriculum.attributes.values():
        curriculum.set_attr_level(attribute.name, min(component.level, len(attribute.levels) - 1))
    config = curriculum.generate_configuration()
    return {option: getattr(config, option) for option in config.__dataclass_fields__}


class ReasoningGym:
    """A task whose questions, answers and scores come from reasoning-gym."""

    def __init__(self, options: ReasoningGymTask, tokenizer: Tokenizer) -> None:
        self.options, self._renderer = options, PromptRenderer(options, tokenizer)
        self.too_long = 0
        """Number of questions that were replaced so far because they have more than ``max_prompt_tokens`` tokens."""
        if problems := list(check_gym(options)):
            raise ConfigError("; ".join(problems))
        self.verifier = ReasoningGymVerifier(options)
        self.datasets = self.verifier.datasets
        self.labels = tuple(options.mixture)
        self._cumulative_weights = tuple(accumulate(options.mixture[label].weight for label in self.labels))
        unstable = sorted(HASH_SEED_DEPENDENT & {self.datasets.dataset_name(label) for label in self.labels})
        if unstable and not os.environ.get("PYTHONHASHSEED", "").isdigit():
            raise ConfigError(
                f"the questions of {', '.join(unstable)} (task.mixture) depend on Python's hash seed, so a run could"
                " not be resumed; set PYTHONHASHSEED=0 in the environment of the ranks"
            )

    def prompts(self, split: Split, seed: int) -> Generated:
        """Return the prompts of a split, an infinite sequence."""
        return Generated(lambda position: self._prompt(split, seed, position))

    def verify(self, prompt: Prompt, response: Response) -> Verdict:
        """Return the verdict of ``ReasoningGymVerifier``."""
        return self.verifier.verify(prompt, response)

    def _prompt(self, split: Split, seed: int, position: int) -> Prompt:
        draw = fold_seed((seed, position, len(self.labels))) / 2**63 * self._cumulative_weights[-1]
        label = self.labels[min(bisect(self._cumulative_weights, draw), len(self.labels) - 1)]
        block, offset = divmod(position, BLOCK_SIZE)
        too_long = 0
        for attempt in range(MAX_ATTEMPTS):
            # Below 2**31: numpy accepts seeds up to 2**32 - 1, and some datasets add the offset to the seed.
            block_seed = fold_seed((seed, text_hash(label), split == "heldout", block, attempt)) % 2**31
            source = f"{label}:{block_seed}:{offset}"
            entry = self.datasets.entry(source)[1]
            if in_heldout_split(entry["question"], self.options.heldout_fraction) != (split == "heldout"):
                continue
            text, ids = self._renderer.render(entry["question"])
            if len(ids) <= self.options.max_prompt_tokens:
                self._count_too_long(too_long)
                metadata = {"task": self.datasets.dataset_name(label), "difficulty": self._difficulty(label)}
                prompt_id = f"{split}-{seed}-{position}"
                return Prompt(prompt_id, ids, text, str(entry["answer"]), {**metadata, "source": source})
            too_long += 1
        raise DataError(
            f"task.mixture.{label}: none of {MAX_ATTEMPTS} questions can be used for the {split} split ({too_long} have"
            f" more than {self.options.max_prompt_tokens} tokens); raise task.max_prompt_tokens, or move"
            f" task.heldout_fraction = {self.options.heldout_fraction:g} toward 0.5, for tasks with few questions"
        )

    def _count_too_long(self, too_long: int) -> None:
        if too_long and not self.too_long:
            logger.warning("questions with more than %d tokens are replaced", self.options.max_prompt_tokens)
        self.too_long += too_long

    def _difficulty(self, label: str) -> str:
        component = self.options.mixture[label]
        if component.level is not None:
            return f"level {component.level}"
        return label if component.dataset else "default"


class ReasoningGymVerifier:
    """Scores the extracted answer of a response; a response without an answer gets 0. Needs no tokenizer."""

    def __init__(self, options: ReasoningGymTask) -> None:
        self.datasets = MixtureDatasets(options)
        self.extract = EXTRACTORS[options.extract]
        self._extraction_rule = options.extract

    def verify(self, prompt: Prompt, response: Response) -> Verdict:
        """Verify a response. One that did not end is wrong."""
        if verdict := unfinished(response):
            return verdict
        answer = self.extract(response.answer_text)
        if answer is None:
            return Verdict(0.0, False, f"no answer found by task.extract = {self._extraction_rule}")
        dataset, entry = self.datasets.entry(prompt.metadata["source"])
        score = float(dataset.score_answer(answer, entry))
        reason = "" if score >= 1.0 else f"{answer[:80]!r} instead of {prompt.answer[:80]}"
        return Verdict(score, score >= 1.0, reason, answer=answer)
