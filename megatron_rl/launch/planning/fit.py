"""Whether the planned memory of a run fits into its GPUs, or into this machine."""

import os
from dataclasses import dataclass

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.estimate import RunEstimate, plans_gpus
from megatron_rl.launch.planning.memory import fullest
from megatron_rl.launch.planning.tables import format_gib


@dataclass(frozen=True)
class MemoryFit:
    """The planned peak of memory, and the memory that there is, in bytes.

    Attributes:
        what: what the peak is of.
        place: what has the memory.
    """

    peak: float
    memory: float
    what: str
    place: str

    @property
    def fits(self) -> bool:
        """Whether there is enough memory."""
        return self.peak <= self.memory

    def __str__(self) -> str:
        return f"{self.what} needs {format_gib(self.peak)} of the {format_gib(self.memory)} GiB of {self.place}"


def memory_fit(loaded: Loaded[Run], estimate: RunEstimate) -> MemoryFit | None:
    """Return whether the run fits; None if its GPUs or its machines are not known.

    On a CPU it is a lower bound: programs and servers need memory of their own.
    """
    peak = fullest(estimate.memories).total
    if estimate.memory_bytes is not None:
        return MemoryFit(peak, estimate.memory_bytes, "a rank", "a GPU")
    if plans_gpus(loaded) or loaded.origin("slurm.nodes") != "default":
        return None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ranks = estimate.layout.ranks
    return MemoryFit(ranks * peak, memory, "1 rank" if ranks == 1 else f"the plan of {ranks} ranks", "this machine")


def describe_misfit(fit: MemoryFit) -> str:
    """Return the problem of a run that does not fit."""
    return (
        f"{fit}; use more ranks, another layout (check lists those that fit), fewer tokens per row"
        ' (train.tokens_per_microbatch), or model.recompute = "full"'
    )
