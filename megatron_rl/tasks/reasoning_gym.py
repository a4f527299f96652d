"""Any task of reasoning-gym, or a mixture: prompts by position, scored by reasoning-gym itself.

    position --> entry of the mixture (by weight) --> block of questions (its seed) --> question --> split by its text

Everything is a function of (seed, position): a question is made again to be scored, wherever that is done.
"""

import hashlib
import importlib.util
import logging
import os
from bisect import bisect
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from itertools import accumulate
from typing import Any, Protocol, cast

from megatron_rl.config.tasks import ReasoningGymTask, Share
from megatron_rl.data.prompts import Generated
from megatron_rl.data.types import Prompt, Response, fold_seed
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.tasks.base import Split, Tokenizer, Verdict
from megatron_rl.tasks.extract import EXTRACTORS
from megatron_rl.tasks.render import render

logger = logging.getLogger(__name__)

BLOCK_SIZE = 64
"""Questions of one dataset of reasoning-gym, which has one seed. Some prepare all of theirs when they are made."""

MAX_ATTEMPTS = 1000
"""Questions that are tried for one position, until one belongs to the split and is short enough."""

HASH_SEED_DEPENDENT = frozenset(
    {
        *("acre", "isomorphic_strings", "knight_swap", "list_functions"),
        *("polynomial_multiplication", "ransom_note", "word_ladder"),
    }
)
"""Tasks of reasoning-gym 0.1.25 that go through sets of texts: their questions depend on PYTHONHASHSEED too."""

Entry = Mapping[str, Any]
"""A question as reasoning-gym has it: ``question``, ``answer``, ``metadata``."""


class Dataset(Protocol):
    """The part of reasoning-gym's datasets that is used."""

    def __getitem__(self, index: int) -> Entry: ...

    def score_answer(self, answer: str | None, entry: Entry) -> float:
        """Return 1 for a right answer, less for others."""
        ...


def check_gym(options: ReasoningGymTask) -> Iterator[str]:
    """Yield what is wrong with a mixture: the package, names of tasks, their options."""
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
    """The datasets of a mixture, made when they are needed."""

    def __init__(self, options: ReasoningGymTask) -> None:
        self.mixture = options.mixture
        self.block = lru_cache(maxsize=256)(self._block)

    def dataset_name(self, label: str) -> str:
        """Return which of reasoning-gym's tasks an entry of the mixture is."""
        return self.mixture[label].dataset or label

    def entry(self, source: str) -> tuple[Dataset, Entry]:
        """Return the question that a prompt's ``source`` names, and the dataset that scores it."""
        label, seed, offset = source.rsplit(":", 2)
        dataset = self.block(label, int(seed))
        return dataset, dataset[int(offset)]

    def _block(self, label: str, seed: int) -> Dataset:
        from reasoning_gym.factory import DATASETS, create_dataset

        name, share = self.dataset_name(label), self.mixture[label]
        if name not in DATASETS or name == "composite":
            close = get_close_matches(name, DATASETS, 1)
            hint = f"did you mean {close[0]}?" if close else "megatron-rl takes the names of reasoning_gym.factory"
            raise ConfigError(f"no such task of reasoning-gym: {name!r} (task.mixture.{label}); {hint}")
        options = {**_level(name, label, share), **share.options, "seed": seed, "size": BLOCK_SIZE}
        known = DATASETS[name][1].__dataclass_fields__
        for option in options:
            if option not in known or option in share.options.keys() & {"seed", "size"}:
                raise ConfigError(
                    f"unknown option {option!r} of reasoning-gym's {name} (task.mixture.{label}.options); it has"
                    f" {', '.join(sorted(set(known) - {'seed', 'size'}))}"
                )
        try:
            return cast(Dataset, create_dataset(name, **options))
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(
                f"reasoning-gym's {name} refuses {dict(share.options)}, level {share.level} (task.mixture.{label}):"
                f" {error or type(error).__name__}"
            ) from error


def _level(name: str, label: str, share: Share) -> Mapping[str, object]:
    """Return the options that a level of the curriculum stands for."""
    if share.level is None:
        return {}
    from reasoning_gym.factory import CURRICULA, create_curriculum

    if name not in CURRICULA:
        raise ConfigError(f"reasoning-gym's {name} has no levels (task.mixture.{label}.level); set options instead")
    curriculum = create_curriculum(name)
    highest = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
    if share.level > highest:
        raise ConfigError(f"task.mixture.{label}.level = {share.level}; {name} has levels 0 to {highest}")
    for attribute in curriculum.attributes.values():
        curriculum.set_attr_level(attribute.name, min(share.level, len(attribute.levels) - 1))
    made = curriculum.generate_configuration()
    return {option: getattr(made, option) for option in made.__dataclass_fields__}


class ReasoningGym:
    """The task. The reward is reasoning-gym's score of what the extraction rule finds; nothing found is 0."""

    def __init__(self, options: ReasoningGymTask, tokenizer: Tokenizer) -> None:
        self.options, self.tokenizer = options, tokenizer
        self.too_long = 0
        """Questions replaced so far because they have more tokens than ``max_prompt_tokens``."""
        if problems := list(check_gym(options)):
            raise ConfigError("; ".join(problems))
        self.judge = ReasoningGymVerifier(options)
        self.gym = self.judge.gym
        self.labels = tuple(options.mixture)
        self._bounds = tuple(accumulate(options.mixture[label].weight for label in self.labels))
        unstable = sorted(HASH_SEED_DEPENDENT & {self.gym.dataset_name(label) for label in self.labels})
        if unstable and not os.environ.get("PYTHONHASHSEED", "").isdigit():
            raise ConfigError(
                f"the questions of {', '.join(unstable)} (task.mixture) change with Python's hash seed, so that no run"
                " could be resumed; set PYTHONHASHSEED=0 in the environment of the ranks"
            )

    def prompts(self, split: Split, seed: int) -> Generated:
        """Return the endless prompts of a split."""
        return Generated(lambda position: self._prompt(split, seed, position))

    def verify(self, prompt: Prompt, response: Response) -> Verdict:
        """See ``ReasoningGymVerifier``."""
        return self.judge.verify(prompt, response)

    def _prompt(self, split: Split, seed: int, position: int) -> Prompt:
        draw = fold_seed((seed, position, len(self.labels))) / 2**63 * self._bounds[-1]
        label = self.labels[min(bisect(self._bounds, draw), len(self.labels) - 1)]
        block, offset = divmod(position, BLOCK_SIZE)
        too_long = 0
        for attempt in range(MAX_ATTEMPTS):
            # Below 2**31: numpy's generators take no larger seed, and a task adds the offset to it.
            block_seed = fold_seed((seed, _number(label), split == "heldout", block, attempt)) % 2**31
            source = f"{label}:{block_seed}:{offset}"
            entry = self.gym.entry(source)[1]
            if (_share(entry["question"]) < self.options.heldout_fraction) != (split == "heldout"):
                continue
            text, ids = render(entry["question"], self.options, self.tokenizer)
            if len(ids) <= self.options.max_prompt_tokens:
                self._count(too_long)
                metadata = {"task": self.gym.dataset_name(label), "difficulty": self._difficulty(label)}
                name = f"{split}-{seed}-{position}"
                return Prompt(name, ids, text, str(entry["answer"]), {**metadata, "source": source})
            too_long += 1
        raise DataError(
            f"task.mixture.{label}: {MAX_ATTEMPTS} questions gave none for the {split} split ({too_long} had more than"
            f" {self.options.max_prompt_tokens} tokens); raise task.max_prompt_tokens, or move task.heldout_fraction"
            f" = {self.options.heldout_fraction:g} towards a half: a task with few different questions needs that"
        )

    def _count(self, too_long: int) -> None:
        if too_long and not self.too_long:
            logger.warning("questions with more than %d tokens are replaced by others", self.options.max_prompt_tokens)
        self.too_long += too_long

    def _difficulty(self, label: str) -> str:
        share = self.options.mixture[label]
        if share.level is not None:
            return f"level {share.level}"
        return label if share.dataset else "default"


class ReasoningGymVerifier:
    """Scores answers; needs no tokenizer."""

    def __init__(self, options: ReasoningGymTask) -> None:
        self.gym = MixtureDatasets(options)
        self.extract = EXTRACTORS[options.extract]
        self._rule = options.extract

    def verify(self, prompt: Prompt, response: Response) -> Verdict:
        """Judge the text of a response; one that did not end is wrong."""
        if response.finish_reason != "stop":
            return Verdict(0.0, False, f"did not end: {response.finish_reason}")
        answer = self.extract(response.answer_text)
        if answer is None:
            return Verdict(0.0, False, f"no answer found by task.extract = {self._rule}")
        dataset, entry = self.gym.entry(prompt.metadata["source"])
        score = float(dataset.score_answer(answer, entry))
        reason = "" if score >= 1.0 else f"{answer[:80]!r} instead of {prompt.answer[:80]}"
        return Verdict(score, score >= 1.0, reason, answer=answer)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _share(question: str) -> float:
    """Return a number in [0, 1) that depends on the text only: a question is in one split, whatever the seed."""
    return fold_seed((_number(question),)) / 2**63
