"""From log-probabilities to the loss: a plain weighted sum of per-token costs, and the metrics that describe it.

Legend: T all tokens of a mini-batch, R trained tokens (of a mini-batch, or of a micro-batch on this rank).
"""

import torch
from torch import Tensor

from megatron_rl.algorithms.correction import Correction
from megatron_rl.algorithms.kl import ReferenceKL, k3
from megatron_rl.algorithms.objectives.base import Cost, Objective, Tokens
from megatron_rl.data.loss_inputs import LossFn, LossInputs
from megatron_rl.data.types import Batch, Columns, Loss, Metrics
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.errors import ConfigError


def prepare(
    batch: Batch,
    objective: Objective,
    correction: Correction | None = None,
    vocabulary: Vocabulary | None = None,
    segment_ids_T: Tensor | None = None,
) -> Columns:
    """Return every theta-free column that the loss of this global mini-batch reads, computed on whole responses.

    The columns of ``objective.prepare``; ``corrections_T``; with ``bypass`` also ``old_logprobs_T``.

    Args:
        batch: a whole mini-batch: all data-parallel ranks, all micro-batches. It has ``old_logprobs_T`` (or, with
            ``bypass``, ``rollout_logprobs_T``), ``advantages_B`` or ``advantages_T``, ``old_entropies_T`` if asked for.
        objective: gives segments, windows and weights.
        correction: what to do about the engine's mismatch.
        vocabulary: see ``Objective.prepare``.
        segment_ids_T: see ``Objective.prepare``.
    """
    correction = correction or Correction()
    replaced: Columns = {}
    if correction.kind != "none" and "rollout_logprobs_T" not in batch:
        raise ConfigError(f'correction kind "{correction.kind}" needs rollout_logprobs: the batch has none, give them')
    if correction.kind == "bypass":
        replaced = {"old_logprobs_T": batch["rollout_logprobs_T"]}
    batch = batch.add(replaced)
    batch = batch.add(own := objective.prepare(batch, vocabulary, segment_ids_T))
    return {**replaced, **own, **correction.columns(Tokens.of(batch))}


def make_loss(objective: Objective, kl: ReferenceKL | None = None, *, keep_tokens: bool = False) -> LossFn:
    """Return the loss of a micro-batch as a function of what the policy computed for it.

    The value is sum_t weights_t * (correction_t * cost_t + coefficient * kl_t): values of ranks and micro-batches add
    up to the loss of the mini-batch. Without trained tokens it is 0 with an (empty) gradient. Ratios and sums are in
    float32, or in float64 if the log-probabilities are. With ``keep_tokens`` the metrics hold what became of each
    token: ``new_logprobs_T``, ``log_ratios_T`` (of its segment), ``clipped_T`` (1 or 0).
    """
    kl = kl or ReferenceKL()

    def loss(logprobs_R: Tensor, entropies_R: Tensor, inputs: LossInputs) -> Loss:
        logprobs_R = logprobs_R.to(torch.promote_types(logprobs_R.dtype, torch.float32))
        cost = objective.cost(logprobs_R, inputs)
        values_R = cost.values_R
        if inputs.corrections_R is not None:
            values_R = values_R * inputs.corrections_R
        if kl.coefficient:
            if inputs.ref_logprobs_R is None:
                raise ConfigError(f"kl.coefficient = {kl.coefficient} needs ref_logprobs: give them, or set it to 0")
            values_R = values_R + kl.coefficient * kl.cost(logprobs_R, inputs.ref_logprobs_R)
        value = (inputs.weights_R * values_R).sum()
        metrics = _metrics(value, logprobs_R, entropies_R, cost, inputs)
        sums = {**metrics.sums, **_gradient_use(value, logprobs_R, inputs)}
        return Loss(value, Metrics(sums, metrics.maxima, _tokens(logprobs_R, cost) if keep_tokens else {}))

    return loss


def _gradient_use(value: Tensor, logprobs_R: Tensor, inputs: LossInputs) -> dict[str, Tensor]:
    """Return what became of the gradient with respect to the log-probs; nothing where no gradient is asked for.

    By differentiating: whatever takes a gradient away (a clip, a gate, an advantage or a weight of 0) counts, in any
    objective. What is differentiated twice is the cost of each token alone, not the model.
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
    """Return sums and maxima over this rank's trained tokens; see ``summary`` for what becomes of them."""
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
    largest = ratio_R.max() if len(ratio_R) else ratio_R.new_zeros(())
    return Metrics({name: total.detach().double() for name, total in sums.items()}, {"ratio": largest.double()})


def summary(metrics: Metrics) -> dict[str, float]:
    """Return the journal's numbers for one mini-batch, from metrics added up over all ranks and micro-batches.

    ``loss``: the loss. Means over trained tokens: ``entropy_mean`` (nats, current policy), ``ratio_mean`` (each token
    with the ratio of its segment), ``clipped_fraction`` (tokens that the trust region took out), ``gradient_fraction``
    (tokens with a gradient), ``policy_kl_mean`` (k3 estimate of KL(old || current)), ``reference_kl_mean`` (k3),
    ``correction_mean``. ``gradient_kept``: sum of |dL / d log-prob|, as a share of the plain policy gradient's, which
    has every ratio 1 and nothing clipped. ``ratio_max``: largest ratio of any segment. ``segments_mean``: segments per
    response. ``tokens``, ``responses``, ``segments``: counts.
    """
    sums = {name: float(total) for name, total in metrics.sums.items()}
    # Counts that were added up as shares of 1: whole numbers but for rounding.
    responses, segments = float(round(sums["responses"])), float(round(sums["segments"]))
    tokens = max(sums["tokens"], 1.0)
    means = {"entropy", "ratio", "policy_kl", "reference_kl", "correction"} & sums.keys()
    return {
        "loss": sums["loss"],
        "tokens": sums["tokens"],
        "responses": responses,
        "segments": segments,
        "segments_mean": segments / max(responses, 1.0),
        "clipped_fraction": sums["clipped"] / tokens,
        **(_kept(sums) if "trained" in sums else {}),
        **{f"{name}_mean": sums[name] / tokens for name in sorted(means)},
        **{f"{name}_max": float(largest) for name, largest in metrics.maxima.items()},
    }


def _kept(sums: dict[str, float]) -> dict[str, float]:
    plain = sums["plain_gradient"]
    return {
        "gradient_fraction": sums["trained"] / max(sums["tokens"], 1.0),
        "gradient_kept": sums["gradient"] / plain if plain else 0.0,
    }
