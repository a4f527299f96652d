"""Streams of prompts that resume from a number: prompt ``i`` is a pure function of the seed and ``i``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch

from megatron_rl.data.types import Prompt, fold_seed


class PromptSource(Protocol):
    """Prompts by position. Positions never end; a finite source begins its next epoch."""

    @property
    def size(self) -> int | None:
        """Different prompts; None if there is no end to them."""
        ...

    def __getitem__(self, position: int) -> Prompt: ...


@dataclass(frozen=True)
class Generated:
    """Prompts that a function makes from their position."""

    make: Callable[[int], Prompt]
    size: None = None

    def __getitem__(self, position: int) -> Prompt:
        return self.make(position)


@dataclass(frozen=True)
class Shuffled:
    """A list of prompts in an order that depends on the seed and the epoch only.

    From the second epoch on the id of a prompt ends in ``+epoch``, so that no two prompts of a stream share one.
    """

    prompts: Sequence[Prompt]
    seed: int

    @property
    def size(self) -> int:
        """Different prompts."""
        return len(self.prompts)

    def __getitem__(self, position: int) -> Prompt:
        epoch, offset = divmod(position, len(self.prompts))
        prompt = self.prompts[epoch_order(len(self.prompts), self.seed, epoch)[offset]]
        return replace(prompt, id=f"{prompt.id}+{epoch}") if epoch else prompt


@lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the order of an epoch: a permutation of ``range(size)``."""
    generator = torch.Generator().manual_seed(fold_seed((seed, epoch)))
    return tuple(torch.randperm(size, generator=generator).tolist())


class PromptStream:
    """Reads a source from a position on; ``position`` is all there is to save and restore."""

    def __init__(self, source: PromptSource, position: int = 0) -> None:
        self.source = source
        self.position = position

    def take(self, count: int) -> tuple[Prompt, ...]:
        """Return the next prompts and move on."""
        first, self.position = self.position, self.position + count
        return tuple(self.source[position] for position in range(first, self.position))


def first_prompts(source: PromptSource, count: int) -> tuple[Prompt, ...]:
    """Return the first ``count`` prompts, or all that there are: the fixed set that an evaluation uses."""
    return PromptStream(source).take(count if source.size is None else min(count, source.size))
