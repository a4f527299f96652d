"""Prompt streams that resume from a position: prompt ``i`` is a pure function of the seed and ``i``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch

from megatron_rl.data.types import Prompt, fold_seed


class PromptSource(Protocol):
    """An infinite sequence of prompts, indexed by position; a finite data set starts over with each epoch."""

    @property
    def size(self) -> int | None:
        """Number of different prompts; None if unlimited."""
        ...

    def __getitem__(self, position: int) -> Prompt: ...


@dataclass(frozen=True)
class Generated:
    """Prompts that a function generates from their position."""

    make: Callable[[int], Prompt]
    size: None = None

    def __getitem__(self, position: int) -> Prompt:
        return self.make(position)


@dataclass(frozen=True)
class Shuffled:
    """A list of prompts, shuffled in each epoch in an order that depends only on the seed and the epoch.

    From the second epoch on, prompt ids end in ``+epoch``, so ids are unique within a stream.
    """

    prompts: Sequence[Prompt]
    seed: int

    @property
    def size(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    def __getitem__(self, position: int) -> Prompt:
        epoch, offset = divmod(position, len(self.prompts))
        prompt = self.prompts[epoch_order(len(self.prompts), self.seed, epoch)[offset]]
        return replace(prompt, id=f"{prompt.id}+{epoch}") if epoch else prompt


@lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the order of prompts in an epoch, a permutation of ``range(size)``."""
    generator = torch.Generator().manual_seed(fold_seed((seed, epoch)))
    return tuple(torch.randperm(size, generator=generator).tolist())


class PromptStream:
    """An iterator over a prompt source. ``position`` is the only state to save and restore."""

    def __init__(self, source: PromptSource, position: int = 0) -> None:
        self.source = source
        self.position = position

    def take(self, count: int) -> tuple[Prompt, ...]:
        """Return the next ``count`` prompts and advance the position."""
        first, self.position = self.position, self.position + count
        return tuple(self.source[position] for position in range(first, self.position))


def first_prompts(source: PromptSource, count: int) -> tuple[Prompt, ...]:
    """Return the first ``count`` prompts, or all prompts of a smaller source: the fixed set of an evaluation."""
    return PromptStream(source).take(count if source.size is None else min(count, source.size))
