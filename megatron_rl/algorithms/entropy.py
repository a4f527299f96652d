"""Entropy bonus: a coefficient times the entropy of the current policy, fixed or controlled towards a target.

The loss is reduced by coefficient * sum_t w_t H_t, with the gradient of the entropy itself, over the whole vocabulary.
The controller is that of Skywork-OR1 (arXiv 2505.22312): after each optimizer step the coefficient rises by ``step`` if
the mean entropy was at most the target, else it falls by ``step``. AER ties the target to the entropy at the start.
"""

from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import Field, model_validator

from megatron_rl.algorithms.tokens import Tokens
from megatron_rl.config.section import Section
from megatron_rl.data.types import Columns

COEFFICIENT, INITIAL_ENTROPY = "entropy_coefficient", "initial_entropy"
"""Names of the numbers that the controller adapts."""


class EntropyBonus(Section):
    """Entropy bonus in the loss, with the same token weights as the objective."""

    coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the mean entropy that is subtracted from the loss; with a target, its value at the start."""
    target: Annotated[float, Field(gt=0)] | None = None
    """Mean entropy in nats per token towards which the coefficient is adapted; none: the coefficient is fixed."""
    target_fraction: Annotated[float, Field(gt=0)] | None = None
    """Target as a fraction of the mean entropy at the first update of the run, in place of ``target``."""
    step: Annotated[float, Field(gt=0)] = 0.005
    """Change of the coefficient per optimizer step."""
    max_coefficient: Annotated[float, Field(gt=0)] = 0.1
    """Largest coefficient that the controller sets."""

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.target is not None and self.target_fraction is not None:
            raise ValueError(
                f"target = {self.target} and target_fraction = {self.target_fraction}: keep one of the two targets"
            )
        if self.is_adaptive and self.coefficient > self.max_coefficient:
            raise ValueError(
                f"coefficient = {self.coefficient} exceeds max_coefficient = {self.max_coefficient}: raise it"
            )
        return self

    @property
    def is_adaptive(self) -> bool:
        """Whether there is a target."""
        return self.target is not None or self.target_fraction is not None

    def initial_state(self) -> dict[str, float]:
        """Return the coefficient at the start of a run; empty if it is fixed."""
        return {COEFFICIENT: self.coefficient} if self.is_adaptive else {}

    def next_state(self, state: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the coefficient, and the entropy at the first update, after an optimizer step.

        Args:
            state: their values during the step.
            metrics: metrics of the whole mini-batch, of which ``entropy_mean`` is read.
        """
        if not self.is_adaptive or not metrics["tokens"]:
            return {name: value for name, value in state.items() if name in (COEFFICIENT, INITIAL_ENTROPY)}
        entropy = metrics["entropy_mean"]
        initial = state.get(INITIAL_ENTROPY, entropy)
        target = self.target if self.target_fraction is None else self.target_fraction * initial
        assert target is not None, "checked by is_adaptive"
        change = self.step if entropy <= target else -self.step
        coefficient = min(max(state[COEFFICIENT] + change, 0.0), self.max_coefficient)
        return {COEFFICIENT: coefficient, INITIAL_ENTROPY: initial}

    def columns(self, tokens: Tokens) -> Columns:
        """Return the column ``entropy_coefficients_T``; empty if the bonus is off."""
        if not self.is_adaptive and not self.coefficient:
            return {}
        coefficient_R = tokens.constant(tokens.state.get(COEFFICIENT, self.coefficient))
        return {"entropy_coefficients_T": tokens.spread(coefficient_R)}
