"""ESPO (entropy importance sampling, arXiv 2512.00499): one clipped ratio per entropy range of a response.

Equations (5) to (11): tau_k = the tokens of a response in the k-th entropy range, s_k = geometric mean of their ratios,
eps_k = (alpha / log V) * mean_{t in tau_k} H_t, weights 1 / (B K_i n_k). The paper does not specify the ranges. The
default here is two ranges: the ``ceil(0.2 N_i)`` tokens of highest entropy, and the rest.
"""

from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_rl.algorithms.objectives.base import Clipped, NonNegative, Tokens
from megatron_rl.algorithms.segments import (
    Ratio,
    entropy_groups,
    joint_ids,
    log_size,
    segment_means,
    segments_per_response,
)
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.vocabulary import Vocabulary

Share = Annotated[float, Field(gt=0, lt=1)]


class ESPO(Clipped):
    """Clip the geometric mean of the token ratios of each entropy group."""

    meant_for_several_updates: ClassVar[bool] = True

    name: Literal["espo"] = "espo"
    alpha: NonNegative = 0.02
    """Width of the window: eps_k = alpha * mean entropy of the group / log V."""
    fixed_window: NonNegative | None = None
    """Window of all groups, independent of entropy, in place of ``alpha``: an ablation of the paper."""
    top_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of a response's tokens, those of highest entropy, that forms the upper of two groups."""
    quantiles: tuple[Share, ...] = ()
    """Borders between groups, quantiles of a response's entropies such as [0.5, 0.8]; in place of ``top_fraction``."""
    thresholds: tuple[NonNegative, ...] = ()
    """Borders between groups in nats; in place of ``top_fraction``."""
    high_only: bool = False
    """Train only the group of highest entropy; the others have weight 0 and do not count in K_i."""
    ratio_form: Literal["detached", "eq9_literal"] = "detached"
    """``detached``: value s_k, as in GSPO-token; ``eq9_literal``: value s_k * r_t, as equation (9) is printed."""

    @model_validator(mode="after")
    def _one_way_to_group(self) -> Self:
        # Compare values instead of testing which fields are set: a saved configuration contains every default.
        fields = type(self).model_fields
        names = ("top_fraction", "quantiles", "thresholds")
        changed = [name for name in names if getattr(self, name) != fields[name].default]
        if len(changed) > 1:
            raise ValueError(f"{' and '.join(changed)} all choose the entropy groups: keep one of them")
        if self.fixed_window is not None and self.alpha != fields["alpha"].default:
            raise ValueError(
                f"alpha = {self.alpha} and fixed_window = {self.fixed_window}: keep one of the two windows"
            )
        return self

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return the entropy groups as segments, the clip window, and the token weights 1 / (B K_i n_k), [R] each."""
        entropies_R = tokens.entropies_R
        trained_R = torch.ones(len(tokens), dtype=torch.bool)
        if segment_ids_R is None:
            groups_R = self._groups(entropies_R, tokens.responses_R)
            segment_ids_R = joint_ids(tokens.responses_R, groups_R)
            if self.high_only:
                trained_R = groups_R == self._num_groups - 1
        means_R, sizes_R = segment_means(entropies_R, segment_ids_R)
        groups_per_response_R = 1 if self.high_only else segments_per_response(segment_ids_R, tokens.responses_R)
        weights_R = trained_R / (tokens.num_responses * groups_per_response_R * sizes_R.double())
        if self.fixed_window is None:
            window_R = (self.alpha / log_size(vocabulary) * means_R).clamp(min=0)
        else:
            window_R = tokens.constant(self.fixed_window)
        return {
            "segment_ids_T": segment_ids_R,
            "clip_low_T": window_R,
            "clip_high_T": window_R,
            "weights_T": weights_R,
        }

    def ratio(self, logprobs_R: Tensor, inputs: LossInputs) -> Ratio:
        """Return the ratio s_k of each token's group, or s_k * r_t if ``ratio_form`` is ``eq9_literal``."""
        ratio = super().ratio(logprobs_R, inputs)
        if self.ratio_form == "detached":
            return ratio
        return Ratio(ratio.token_log_R, ratio.log_R + ratio.token_log_R.detach(), ratio.shares_R)

    def _groups(self, entropies_R: Tensor, responses_R: Tensor) -> Tensor:
        if self.thresholds:
            return entropy_groups(entropies_R, responses_R, thresholds=self.thresholds)
        shares = [1 - Fraction(str(q)) for q in self.quantiles] or [Fraction(str(self.top_fraction))]
        return entropy_groups(entropies_R, responses_R, upper_shares=shares)

    @property
    def _num_groups(self) -> int:
        return 1 + (len(self.thresholds) or len(self.quantiles) or 1)
