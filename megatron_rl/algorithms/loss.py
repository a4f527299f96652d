"""The loss as a weighted sum of per-token costs, and its metrics.

Legend: T all tokens of a mini-batch, R trained tokens (of a mini-batch, or of a micro-batch on this rank).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_rl.algorithms.correction import DROPPED, Correction
from megatron_rl.algorithms.entropy import EntropyBonus
from megatron_rl.algorithms.finite import SMALLEST_LOGPROB, finite_logprobs
from megatron_rl.algorithms.kl import ReferenceKL, k3
from megatron_rl.algorithms.objectives.base import Cost, Objective, Tokens, Total, only_part
from megatron_rl.data.columns import EXTRA
from megatron_rl.data.loss_inputs import LossFn, LossInputs
from megatron_rl.data.types import Batch, Columns, Loss, Metrics
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.errors import ConfigError

MEASURE = "objective/"
"""Prefix of the metrics that an objective measures itself."""
LOGPROBS = ("old_logprobs_T", "current_logprobs_T", "rollout_logprobs_T", "ref_logprobs_T")
"""Columns of log-probs that a loss reads."""
GATE = "gate/"
"""Prefix of the metrics of what the correction drops."""


def prepare(
    batch: Batch,
    objective: Objective,
    correction: Correction | None = None,
    vocabulary: Vocabulary | None = None,
    segment_ids_T: Tensor | None = None,
    total: Total = only_part,
    *,
    entropy: EntropyBonus | None = None,
    state: Mapping[str, float] | None = None,
) -> Columns:
    """Return all columns that the loss of a mini-batch reads and that are fixed during its update.

    These are the columns of ``objective.prepare``, those of ``Correction.columns``,
    ``entropy_coefficients_T`` if there is an entropy bonus, for the correction kind ``bypass`` ``old_logprobs_T`` with
    the values of ``rollout_logprobs_T``, and every column of log-probs that has a probability of 0, with
    ``SMALLEST_LOGPROB`` in place of -inf. Token weights are multiplied by ``pruning_weights_B`` of the batch, if any.

    Args:
        batch: whole responses: the mini-batch, or the part of it that this rank owns. It has ``old_logprobs_T`` (for
            ``bypass``: ``rollout_logprobs_T``), ``advantages_B`` or ``advantages_T``, and ``old_entropies_T`` if the
            objective uses entropies.
        objective: computes segments, clip windows and token weights.
        correction: correction of the mismatch between rollout engine and trainer; None: no correction.
        vocabulary: required by objectives that use the text of tokens or log V.
        segment_ids_T: int64, segments to use in place of the objective's; unique per response.
        total: adds a tensor over all parts of the mini-batch: denominators are global counts. Every part calls it in
            the same order. Default: ``batch`` is the whole mini-batch.
        entropy: entropy bonus; None: no bonus.
        state: numbers that the loss adapts, ``LossState.values``; None: those at the start of a run.

    Raises:
        ConfigError: the batch lacks a column that the objective or the correction needs.
    """
    correction, entropy = correction or Correction(), entropy or EntropyBonus()
    state = {**objective.initial_state(), **entropy.initial_state()} if state is None else state
    replaced: dict[str, Tensor] = {}
    for name in LOGPROBS:
        if name in batch and bool((batch[name] < SMALLEST_LOGPROB).any()):
            replaced[name] = finite_logprobs(batch[name])
    batch = batch.add(replaced)
    if reads_current_logprobs(objective, correction) and "current_logprobs_T" not in batch:
        replaced["current_logprobs_T"] = batch["old_logprobs_T"]  # the first update of a step
    if correction.reads_rollout_logprobs and "rollout_logprobs_T" not in batch:
        name = f'correction.kind = "{correction.kind}"' if correction.kind != "none" else "a gate of correction"
        raise ConfigError(f"{name} needs rollout_logprobs: the batch has none, pass them")
    if correction.kind == "bypass":
        replaced["old_logprobs_T"] = batch["rollout_logprobs_T"]
    batch = batch.add(replaced)
    batch = batch.add(prepared := objective.prepare(batch, vocabulary, segment_ids_T, total, state))
    tokens = Tokens.of(batch, state=state)
    columns = {**replaced, **prepared, **correction.columns(tokens), **entropy.columns(tokens)}
    if "pruning_weights_B" in batch:
        weights_R = columns["weights_T"][tokens.positions_R].double()
        columns["weights_T"] = tokens.spread(weights_R * batch["pruning_weights_B"][tokens.responses_R])
    return columns


def reads_current_logprobs(objective: Objective, correction: Correction) -> bool:
    """Return whether ``prepare`` reads ``current_logprobs_T``, which cost a forward pass per update."""
    return objective.reads_current_logprobs or correction.reads_current_logprobs


def make_loss(objective: Objective, kl: ReferenceKL | None = None, *, keep_tokens: bool = False) -> LossFn:
    """Return the loss function of a micro-batch.

    Its value is sum_t weights_t * (factor_t * correction_t * cost_t + kl_coefficient * kl_t - entropy_coefficient *
    entropy_t), so values of ranks and micro-batches add up to the loss of the mini-batch. Without trained tokens the
    value is 0, with an empty gradient. Ratios and sums are in float32, or in float64 if the log-probabilities are.
    Log-probabilities of -inf have no gradient, and loss and gradient are finite (``finite_logprobs``).

    Args:
        objective: computes the cost of each token.
        kl: the KL penalty; None: no penalty.
        keep_tokens: return per-token columns in ``Metrics.tokens``: ``new_logprobs_T``, ``log_ratios_T`` (of the
            token's segment) and ``clipped_T`` (1 or 0).
    """
    kl = kl or ReferenceKL()

    def loss(logprobs_R: Tensor, entropies_R: Tensor, inputs: LossInputs) -> Loss:
        logprobs_R = logprobs_R.to(torch.promote_types(logprobs_R.dtype, torch.float32))
        logprobs_R = finite_logprobs(logprobs_R)
        cost = objective.cost(logprobs_R, inputs)
        values_R = cost.values_R
        if inputs.factors_R is not None:
            values_R = values_R * inputs.factors_R
        if inputs.corrections_R is not None:
            values_R = values_R * inputs.corrections_R
        if kl.in_loss:
            if inputs.ref_logprobs_R is None:
                raise ConfigError(f"kl.coefficient = {kl.coefficient} needs ref_logprobs: pass them, or set it to 0")
            values_R = values_R + kl.in_loss * kl.cost(logprobs_R, inputs.ref_logprobs_R, inputs.old_logprobs_R)
        if inputs.entropy_coefficients_R is not None:
            values_R = values_R - inputs.entropy_coefficients_R * entropies_R
        value = (inputs.weights_R * values_R).sum()
        metrics = _metrics(value, logprobs_R, entropies_R, cost, inputs)
        sums = {**metrics.sums, **_gradient_sums(value, logprobs_R, inputs)}
        return Loss(value, Metrics(sums, metrics.maxima, _tokens(logprobs_R, cost) if keep_tokens else {}))

    return loss


def _gradient_sums(value: Tensor, logprobs_R: Tensor, inputs: LossInputs) -> dict[str, Tensor]:
    """Return sums over the gradient with respect to the log-probs; empty if the loss requires no gradient.

    The loss is differentiated, so everything that removes a gradient counts, in any objective: a clip, a gate, an
    advantage or a weight of 0. The backward pass stops at ``logprobs_R`` and does not run through the model.
    """
    if not value.requires_grad:
        return {}
    (gradient_R,) = torch.autograd.grad(value, logprobs_R, retain_graph=True)
    plain_R = inputs.weights_R * inputs.advantages_R
    sums = (gradient_R.count_nonzero(), gradient_R.abs().sum(), plain_R.abs().sum())
    return dict(zip(("trained", "gradient", "plain_gradient"), (total.double() for total in sums), strict=True))


def _tokens(logprobs_R: Tensor, cost: Cost) -> Columns:
    logprobs_R = logprobs_R.detach()
    clipped_R = cost.clipped_R.to(logprobs_R.dtype)
    return {"new_logprobs_T": logprobs_R, "log_ratios_T": cost.ratio.log_R, "clipped_T": clipped_R}


@torch.no_grad()
def _metrics(value: Tensor, logprobs_R: Tensor, entropies_R: Tensor, cost: Cost, inputs: LossInputs) -> Metrics:
    """Return the sums and maxima over this rank's trained tokens from which ``summary`` computes the metrics."""
    ratio_R = cost.ratio.value_R
    sums = {
        "loss": value,
        "tokens": torch.ones_like(ratio_R).sum(),
        "responses": inputs.response_shares_R.sum(),
        "segments": cost.ratio.shares_R.sum(),
        "ratio": ratio_R.sum(),
        "clipped": cost.clipped_R.sum(),
        "entropy": entropies_R.sum(),
        "policy_kl": k3(logprobs_R - inputs.old_logprobs_R).sum(),
    }
    if inputs.ref_logprobs_R is not None:
        sums["reference_kl"] = k3(inputs.ref_logprobs_R - logprobs_R).sum()
    if inputs.corrections_R is not None:
        sums["correction"] = inputs.corrections_R.sum()
    if inputs.entropy_coefficients_R is not None:
        sums["entropy_coefficient"] = inputs.entropy_coefficients_R.sum()
    if cost.measures:
        sums["weight"] = inputs.weights_R.sum()
        sums |= {MEASURE + name: (inputs.weights_R * values_R).sum() for name, values_R in cost.measures.items()}
    dropped = {name: values_R for name, values_R in inputs.extra.items() if f"{EXTRA}{name}".startswith(DROPPED)}
    sums |= {GATE + f"{EXTRA}{name}".removeprefix(DROPPED): values_R.sum() for name, values_R in dropped.items()}
    largest = ratio_R.max() if len(ratio_R) else ratio_R.new_zeros(())
    return Metrics({name: total.detach().double() for name, total in sums.items()}, {"ratio": largest.double()})


def summary(metrics: Metrics) -> dict[str, float]:
    """Return the recorded metrics of one mini-batch from metrics reduced over all ranks and micro-batches.

    * ``loss``: the loss.
    * ``tokens``, ``responses``, ``segments``: counts; ``segments_mean``: segments per response.
    * Means over trained tokens: ``entropy_mean`` (current policy, nats), ``ratio_mean`` (each token with the ratio of
      its segment), ``policy_kl_mean`` (k3 estimate of KL(old || current), nats), ``reference_kl_mean`` (k3 estimate of
      KL(current || reference), nats), ``correction_mean``.
    * Fractions of trained tokens: ``clipped_fraction`` (clipped, masked or capped by the objective),
      ``gradient_fraction`` (with a nonzero gradient).
    * ``gradient_kept``: sum of |d loss / d log-prob|, relative to that of the plain policy gradient (every ratio 1,
      nothing clipped).
    * ``ratio_max``: largest ratio of any segment.
    * ``entropy_coefficient``: coefficient of the entropy bonus.
    * ``gate/NAME``: fraction of trained tokens that the gate NAME of the correction drops.
    * ``objective/NAME``: the objective's ``Cost.measures``, means weighted like the loss.
    """
    sums = {name: float(total) for name, total in metrics.sums.items()}
    # Counts summed from fractions: integers up to rounding.
    responses, segments = float(round(sums["responses"])), float(round(sums["segments"]))
    tokens = max(sums["tokens"], 1.0)
    measures = [name for name in sums if name.startswith(MEASURE)]
    means = {"entropy", "ratio", "policy_kl", "reference_kl", "correction"} & sums.keys()
    return {
        "loss": sums["loss"],
        "tokens": sums["tokens"],
        "responses": responses,
        "segments": segments,
        "segments_mean": segments / max(responses, 1.0),
        "clipped_fraction": sums["clipped"] / tokens,
        **(_gradient_shares(sums) if "trained" in sums else {}),
        **{f"{name}_mean": sums[name] / tokens for name in sorted(means)},
        **{name: sums[name] / tokens for name in ("entropy_coefficient",) if name in sums},
        **{name: total / tokens for name, total in sums.items() if name.startswith(GATE)},
        **{name: sums[name] / sums["weight"] if sums["weight"] else 0.0 for name in measures},
        **{f"{name}_max": float(largest) for name, largest in metrics.maxima.items()},
    }


def _gradient_shares(sums: dict[str, float]) -> dict[str, float]:
    plain = sums["plain_gradient"]
    return {
        "gradient_fraction": sums["trained"] / max(sums["tokens"], 1.0),
        "gradient_kept": sums["gradient"] / plain if plain else 0.0,
    }
