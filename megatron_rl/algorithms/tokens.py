"""The trained tokens of a mini-batch, from which objectives and corrections compute their columns.

Legend: T all tokens of a batch, R its trained tokens, B responses.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_rl.data.types import Batch
from megatron_rl.errors import ConfigError

SIGN = torch.iinfo(torch.int64).min
"""The sign bit of an int64."""

Total = Callable[[Tensor], Tensor]
"""Returns the element-wise sum of a tensor over all parts of a mini-batch; every part calls it in the same order."""


def only_part(values: Tensor) -> Tensor:
    """Return the tensor itself, which is its total if a batch is the whole mini-batch."""
    return values


@dataclass(frozen=True)
class Tokens:
    """The trained tokens of a batch of whole responses: a mini-batch, or this rank's part of one.

    Columns have entries for the batch. The two counts and ``total`` are over the whole mini-batch.

    Attributes:
        batch: the batch.
        positions_R: int64, positions of the trained tokens among all tokens of the batch.
        responses_R: int64, index of the response that each trained token belongs to.
        counts_R: int64, number of trained tokens of that response (N_i of the equations).
        num_responses: number of responses of the mini-batch with a trained token, pruned ones included (B of the
            equations).
        num_tokens: number of trained tokens of the mini-batch, pruned ones included (the sum of N_i).
        num_present: number of trained tokens of the mini-batch without those of pruned responses.
        total: adds a tensor over all parts of the mini-batch.
        state: numbers that the loss adapts once per optimizer step, by name (see ``LossState``).
    """

    batch: Batch
    positions_R: Tensor
    responses_R: Tensor
    counts_R: Tensor
    num_responses: int
    num_tokens: int
    num_present: int
    total: Total = only_part
    state: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch, total: Total = only_part, state: Mapping[str, float] | None = None) -> "Tokens":
        """Return the trained tokens of ``batch``, with the counts of its mini-batch; collective if ``total`` is."""
        counts_B, positions_R = batch.trainable_counts_B, batch.trained_R
        responses_R = batch.response_ids_T[positions_R]
        counts = [(counts_B > 0).sum(), counts_B.sum()]
        if "unpruned_tokens_B" in batch:
            counts += [batch["unpruned_responses_B"].sum(), batch["unpruned_tokens_B"].sum()]
        sums = total(torch.stack(counts)).tolist()
        counts_R = counts_B[responses_R]
        return cls(batch, positions_R, responses_R, counts_R, sums[-2], sums[-1], sums[1], total, state or {})

    def __len__(self) -> int:
        return len(self.positions_R)

    def __getitem__(self, name: str) -> Tensor:
        """Return the values of the column ``name`` at the trained tokens, [R].

        Raises:
            ConfigError: the batch has no such column.
        """
        if name not in self.batch:
            known = ", ".join(sorted(self.batch.columns))
            raise ConfigError(f"the objective needs {name}, which the batch lacks: it has {known}")
        return self.batch[name][self.positions_R]

    @property
    def advantages_R(self) -> Tensor:
        """Advantages at the trained tokens, from ``advantages_T`` or else ``advantages_B`` of the batch."""
        if "advantages_T" in self.batch:
            return self["advantages_T"]
        return self.batch["advantages_B"][self.responses_R]

    @property
    def entropies_R(self) -> Tensor:
        """Entropies of the old policy at the trained tokens, in nats; a ConfigError if the batch has none."""
        if "old_entropies_T" not in self.batch:
            raise ConfigError("the objective needs the old policy's entropies (old_entropies_T in a batch): pass them")
        return self["old_entropies_T"]

    def mean(self, values_R: Tensor) -> Tensor:
        """Return the mean of the values over all trained tokens of the mini-batch, float64 scalar; NaN without any."""
        return self.total(values_R.double().sum()) / self.num_present

    def largest(self, values_R: Tensor, count: int) -> Tensor:
        """Return which tokens have one of the ``count`` largest values of the mini-batch, bool [R], with ties.

        All values that equal the smallest chosen one are chosen, so neither the order of the tokens nor their division
        into parts matters. Radix selection: eight sums of 256 counts over the parts.

        Args:
            values_R: float64, without NaN.
            count: number of values; 0 or less chooses none.
        """
        if count <= 0:
            return torch.zeros(len(values_R), dtype=torch.bool)
        bits_R = (values_R.double() + 0.0).view(torch.int64)  # -0.0 becomes 0.0
        keys_R = torch.where(bits_R < 0, ~bits_R, bits_R | SIGN)  # in the order of the values, as unsigned integers
        chosen_R, open_R = torch.zeros_like(keys_R, dtype=torch.bool), torch.ones_like(keys_R, dtype=torch.bool)
        for shift in range(56, -8, -8):
            digits_R = (keys_R >> shift) & 255
            above = self.total(torch.bincount(digits_R[open_R], minlength=256)).flip(0).cumsum(0).flip(0)
            digit = int((above >= count).sum()) - 1  # of the smallest chosen value; -1: there are fewer than count
            chosen_R |= open_R & (digits_R > digit)
            count -= int(above[digit + 1]) if digit < 255 else 0
            open_R &= digits_R == digit
        return chosen_R | open_R

    def constant(self, value: float) -> Tensor:
        """Return ``value`` for every trained token, float64 [R]."""
        return torch.full((len(self),), value, dtype=torch.float64)

    def spread(self, values_R: Tensor) -> Tensor:
        """Return a column over all tokens, [T], with ``values_R`` at the trained tokens.

        Untrained tokens get -1 in integer columns and 0 in floating-point columns. Floating-point columns have the
        dtype of the log-probabilities, at least float32.
        """
        ids = not values_R.dtype.is_floating_point
        dtype = values_R.dtype if ids else torch.promote_types(self._dtype, torch.float32)
        column_T = torch.full((len(self.batch["loss_mask_T"]),), -1 if ids else 0, dtype=dtype)
        column_T[self.positions_R] = values_R.to(dtype)
        return column_T

    @property
    def _dtype(self) -> torch.dtype:
        known = [n for n in ("old_logprobs_T", "rollout_logprobs_T") if n in self.batch]
        return self.batch[known[0]].dtype if known else torch.float32
