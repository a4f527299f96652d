"""The numbers that a loss adapts once per optimizer step, such as a multiplier or a coefficient.

They are computed from metrics of the whole mini-batch, which are reduced over all ranks, so they are equal on every
rank. They reach the loss as columns of the prepared mini-batch, and checkpoints save them.
"""

from collections.abc import Mapping
from typing import Protocol

from megatron_rl.algorithms.loss import summary
from megatron_rl.data.types import Metrics
from megatron_rl.errors import DataError


class Adaptive(Protocol):
    """A part of the loss with numbers that it adapts: an objective, the entropy bonus."""

    def initial_state(self) -> dict[str, float]:
        """Return the numbers at the start of a run."""
        ...

    def next_state(self, state: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the numbers after an optimizer step with these metrics."""
        ...


class LossState:
    """The current numbers of all adaptive parts of a loss.

    Args:
        parts: the adaptive parts.
        saved: numbers to continue from, as for ``restore``.

    Attributes:
        values: the numbers by name.
    """

    def __init__(self, *parts: Adaptive, saved: Mapping[str, object] | None = None) -> None:
        self._parts = parts
        self.values: dict[str, float] = {}
        for part in parts:
            self.values |= part.initial_state()
        self.restore(saved or {})

    def advance(self, metrics: Metrics) -> None:
        """Adapt all numbers after an optimizer step, from the metrics that ``forward_backward`` returned for it."""
        measured = summary(metrics)
        adapted: dict[str, float] = {}
        for part in self._parts:
            adapted |= part.next_state(self.values, measured)
        self.values = adapted

    def restore(self, saved: Mapping[str, object]) -> None:
        """Continue from the numbers of a checkpoint; those that it lacks start anew, those of other losses are ignored.

        Raises:
            DataError: a value is not a number.
        """
        for name, value in saved.items():
            if not isinstance(value, int | float):
                raise DataError(f"the checkpoint's state of the loss has {name} = {value!r}, which is not a number")
            self.values[name] = float(value)
