"""The reference policy of the KL penalty: a copy of the weights in host memory, which may follow the policy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.config.schema import Run


class Reference:
    """The weights of the reference policy on this rank, at first those of the policy.

    Args:
        run: the configuration; ``kl.refresh_every`` and ``kl.refresh_decay`` say how the reference follows.
        parameters: this rank's parameters.

    Attributes:
        values: the reference's tensor of each parameter.
    """

    def __init__(self, run: Run, parameters: Sequence[Tensor]) -> None:
        self._decay, self._updates = run.kl.refresh_decay, run.kl.refresh_every * run.train.updates_per_step
        self.values = [parameter.detach().cpu().clone() for parameter in parameters]
        if self._decay:  # a moving average in bfloat16 would round small changes away
            self.values = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in self.values]

    @torch.no_grad()
    def follow(self, parameters: Sequence[Tensor], updates: int) -> None:
        """Move the reference if it is due after this many optimizer steps: decay * itself + (1 - decay) * policy."""
        if not self._updates or updates % self._updates:
            return
        for value, parameter in zip(self.values, parameters, strict=True):
            value.mul_(self._decay).add_(parameter.detach().cpu().to(value.dtype), alpha=1 - self._decay)

    def saved(self, parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Return the reference's tensor of each parameter for a checkpoint; empty if the reference never moves."""
        return dict(zip(parameters, self.values, strict=True)) if self._updates else {}
