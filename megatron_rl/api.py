"""Public loss functions for use outside the trainer: the code that the trainer runs, on padded tensors.

Legend: B responses (one per row), S padded length.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_rl.algorithms.correction import Correction, mismatch
from megatron_rl.algorithms.entropy import EntropyBonus
from megatron_rl.algorithms.kl import ReferenceKL
from megatron_rl.algorithms.loss import make_loss, prepare, summary
from megatron_rl.algorithms.objectives import AnyObjective
from megatron_rl.algorithms.state import LossState
from megatron_rl.algorithms.tokens import Total, only_part
from megatron_rl.config.explain import explain
from megatron_rl.config.load import leaves
from megatron_rl.config.section import Section
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.types import Batch, Columns, Loss, Metrics
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.errors import ConfigError
from megatron_rl.ops.vocab import vocab_logprobs_entropies

__all__ = ["Option", "PolicyLoss", "Totals", "next_state", "policy_loss", "vocab_logprobs_entropies"]

Option = bool | int | float | str | None | list[float] | tuple[float, ...] | Mapping[str, object]


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of a mini-batch and its metrics, as returned by ``policy_loss``.

    Attributes:
        loss: scalar to minimize, differentiable with respect to ``logprobs``.
        metrics: metrics of the mini-batch by name, with the keys of ``megatron_rl.algorithms.loss.summary`` and
            ``megatron_rl.algorithms.correction.mismatch``; ``entropy_mean`` only if entropies are passed.
        state: numbers that the loss adapts once per optimizer step, to pass to the next call; empty for most losses.
        sums: sums over the trained tokens of the rows, for ``next_state``: the sums of several parts may be added.
    """

    loss: Tensor
    metrics: dict[str, float]
    state: dict[str, float]
    sums: dict[str, float]


@dataclass(frozen=True)
class Totals:
    """Counts of a whole mini-batch, for a caller that computes the loss of one part of it at a time.

    With them the losses and gradients of all micro-batches and data-parallel ranks add up to those of the mini-batch.
    Metrics are those of the part. ``PolicyLoss.state`` is not adapted: ``next_state`` does it after the last part.

    Attributes:
        responses: responses of the mini-batch that have a trained token.
        tokens: trained tokens of the mini-batch.
    """

    responses: int
    tokens: int

    def total(self) -> Total:
        """Return the function that ``prepare`` calls: the counts at the first call, an error at any other."""
        counts = iter([torch.tensor([self.responses, self.tokens])])

        def total(values: Tensor) -> Tensor:
            found = next(counts, None)
            if found is None:
                raise ConfigError(
                    "these options need a sum over the whole mini-batch, which totals does not have; pass a function"
                    " that adds a tensor over all parts as totals, or for sspo set entropy_reference"
                )
            return found

        return total


class _Options(Section):
    """Options of ``policy_loss``: the objective, and the optional tables ``correction``, ``kl`` and ``entropy``."""

    objective: AnyObjective
    correction: Correction = Correction()
    kl: ReferenceKL = ReferenceKL()
    entropy: EntropyBonus = EntropyBonus()

    def prepare(
        self,
        batch: Batch,
        vocab_size: int | None,
        segment_ids_T: Tensor | None,
        adapted: LossState,
        totals: Totals | Total | None,
    ) -> Columns:
        """Return the columns that the loss reads."""
        columns = prepare(
            batch,
            self.objective,
            self.correction,
            None if vocab_size is None else Vocabulary(vocab_size),
            segment_ids_T,
            totals.total() if isinstance(totals, Totals) else totals or only_part,
            entropy=self.entropy,
            state=adapted.values,
        )
        if "extra_factors_T" not in batch:
            return columns
        factors_T = batch["extra_factors_T"]
        return {**columns, "corrections_T": columns.get("corrections_T", torch.ones_like(factors_T)) * factors_T}


def policy_loss(
    objective: str | Mapping[str, Option],
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    entropies: Tensor | None = None,
    segment_ids: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    vocab_size: int | None = None,
    current_entropies: Tensor | None = None,
    state: Mapping[str, float] | None = None,
    totals: Totals | Total | None = None,
    factors: Tensor | None = None,
) -> PolicyLoss:
    """Compute the loss of a mini-batch of padded responses with the code that the trainer uses.

    Computation is in float32, or in float64 if ``logprobs`` is. Values at masked positions are never read.

    Args:
        objective: a name such as ``"grpo"`` or ``"path/to/mine.py:Mine"``, or a table of options:
            ``{"name": "espo", "alpha": 0.02}``, with the tables ``correction``, ``kl``, ``entropy`` of a run.
        logprobs: [B, S], log-probabilities of the tokens under the current weights in nats, with gradient.
        old_logprobs: [B, S], log-probabilities under the weights at the start of the rollout batch.
        advantages: [B] or [B, S], advantage per response or per token.
        loss_mask: [B, S], True or 1 on trained tokens, else False or 0. Rows without a trained token do not count.
        entropies: [B, S], entropies of the old policy in nats; required by aspo, espo and most settings of sspo.
        segment_ids: [B, S] int, -1 where masked; tokens of a row with the same id share an importance ratio. Required
            by sspo; other clipped objectives use them in place of the segments that they would compute.
        rollout_logprobs: [B, S], log-probabilities that the rollout engine reported. Required by dppo, dis, minpro,
            ``anchor = "rollout"`` and ``correction``; otherwise they only add the ``mismatch_`` metrics.
        ref_logprobs: [B, S], log-probabilities under a reference policy; required if ``kl.coefficient`` is above 0.
        vocab_size: number of token ids of the model; required by espo and by ``entropy_scale = "log_vocab"``.
        current_entropies: [B, S], entropies under the current weights in nats, with gradient; required by ``entropy``.
        state: ``PolicyLoss.state`` of the previous optimizer step; None: the numbers at the start of a run.
        totals: if the rows are a part of a mini-batch, its counts, or a function that adds a tensor over all parts; the
            losses of all parts add up to that of the mini-batch. Counts do not adapt ``PolicyLoss.state``.
        factors: [B, S], factors of the tokens' costs without gradient, such as importance weights of the caller.

    Raises:
        ConfigError: an option is invalid, or the objective needs a tensor or a sum that is missing.
        ValueError: the shape or dtype of a tensor is wrong.
    """
    options = _options(objective)
    _check_shapes(logprobs, loss_mask, advantages)
    columns = {
        "advantages": advantages[:, None].expand(loss_mask.shape) if advantages.dim() == 1 else advantages,
        "old_logprobs": old_logprobs,
        "old_entropies": entropies,
        "rollout_logprobs": rollout_logprobs,
        "ref_logprobs": ref_logprobs,
        "current_logprobs": logprobs,
        "extra_factors": factors,
    }
    batch = _batch(loss_mask, {name: column for name, column in columns.items() if column is not None}, logprobs.dtype)
    adapted = LossState(options.objective, options.entropy, saved=state or {})
    batch = batch.add(options.prepare(batch, vocab_size, _segments(segment_ids, loss_mask), adapted, totals))
    return _evaluate(options, batch, adapted, logprobs, current_entropies, totals)


def next_state(
    objective: str | Mapping[str, Option], *, sums: Mapping[str, float], state: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return the numbers that a loss adapts after an optimizer step on a mini-batch that was evaluated in parts.

    Up to rounding they are those that ``policy_loss`` returns for the whole mini-batch.

    Args:
        objective: as for ``policy_loss``.
        sums: ``PolicyLoss.sums``, added over all micro-batches and data-parallel ranks of the mini-batch.
        state: the numbers that were passed to ``policy_loss`` for the parts; None: those at the start of a run.

    Raises:
        ConfigError: an option is invalid, or a sum is missing.
    """
    options = _options(objective)
    adapted = LossState(options.objective, options.entropy, saved=state or {})
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
    try:
        adapted.advance(Metrics(values))
    except KeyError as error:
        raise ConfigError(f"next_state needs the sum {error}: pass PolicyLoss.sums of the same objective") from None
    return adapted.values


def _evaluate(
    options: _Options,
    batch: Batch,
    adapted: LossState,
    logprobs: Tensor,
    current_entropies: Tensor | None,
    totals: Totals | Total | None,
) -> PolicyLoss:
    """Return the loss and its metrics; adapt the state from sums over all parts, if ``totals`` can add them."""
    mask_BS = batch["loss_mask_T"].view(logprobs.shape).to(logprobs.device)
    inputs = LossInputs.gather(batch).map(lambda tensor: tensor.to(logprobs.device))
    entropies_R = _entropies(current_entropies, mask_BS, inputs)
    loss = make_loss(options.objective, options.kl)(logprobs[mask_BS], entropies_R, inputs)
    if adapted.values and not isinstance(totals, Totals):
        total = totals or only_part
        sums = total(torch.stack([value.cpu() for value in loss.metrics.sums.values()]))
        adapted.advance(Metrics(dict(zip(loss.metrics.sums, sums, strict=True))))
    return _result(loss, batch, adapted, has_entropies="old_entropies_T" in batch or current_entropies is not None)


def _result(loss: Loss, batch: Batch, adapted: LossState, *, has_entropies: bool) -> PolicyLoss:
    metrics = summary(loss.metrics) | mismatch(batch)
    if not has_entropies:
        del metrics["entropy_mean"]
    sums = {name: float(value) for name, value in loss.metrics.sums.items()}
    return PolicyLoss(loss.value, metrics, adapted.values, sums)


def _entropies(current_entropies: Tensor | None, loss_mask: Tensor, inputs: LossInputs) -> Tensor:
    """Return the current policy's entropies at the trained tokens, or the old policy's if there is no entropy bonus."""
    if current_entropies is not None:
        if current_entropies.shape != loss_mask.shape:
            shape = list(loss_mask.shape)
            raise ValueError(f"current_entropies is {list(current_entropies.shape)}: expected {shape}, as loss_mask")
        return current_entropies[loss_mask.bool()].to(inputs.weights_R.dtype)
    if inputs.entropy_coefficients_R is not None:
        raise ConfigError("the entropy bonus needs the current policy's entropies: pass current_entropies")
    return torch.zeros_like(inputs.weights_R) if inputs.old_entropies_R is None else inputs.old_entropies_R


def _check_shapes(logprobs: Tensor, loss_mask: Tensor, advantages: Tensor) -> None:
    if loss_mask.dim() != 2:
        raise ValueError(f"loss_mask is {list(loss_mask.shape)}: expected [rows, padded length]")
    if loss_mask.dtype != torch.bool and not bool(((loss_mask == 0) | (loss_mask == 1)).all()):
        wrong = loss_mask[(loss_mask != 0) & (loss_mask != 1)][0].item()
        raise ValueError(
            f"loss_mask has the value {wrong}: write 1 or True at trained tokens and 0 elsewhere; weights of tokens are"
            " factors"
        )
    if logprobs.shape != loss_mask.shape:
        raise ValueError(f"logprobs is {list(logprobs.shape)}: expected {list(loss_mask.shape)}, as loss_mask")
    if advantages.dim() == 1 and len(advantages) != len(loss_mask):
        raise ValueError(f"advantages is {list(advantages.shape)}: expected one per row, [{len(loss_mask)}]")


def _batch(loss_mask: Tensor, columns: Mapping[str, Tensor], dtype: torch.dtype) -> Batch:
    """Return padded [B, S] columns as a batch of B sequences of S tokens, detached, on the CPU, at least float32."""
    dtype = torch.promote_types(dtype, torch.float32)
    for name, column in columns.items():
        if column.shape != loss_mask.shape:
            shape = list(loss_mask.shape)
            raise ValueError(f"{name.removeprefix('old_')} is {list(column.shape)}: expected {shape}, as loss_mask")
    flat = {f"{name}_T": column.detach().to(dtype).flatten().cpu() for name, column in columns.items()}
    lengths_B = torch.full((len(loss_mask),), loss_mask.shape[1])
    return Batch(lengths_B, {"loss_mask_T": loss_mask.bool().flatten().cpu(), **flat})


def _segments(segment_ids: Tensor | None, loss_mask: Tensor) -> Tensor | None:
    if segment_ids is None:
        return None
    if segment_ids.shape != loss_mask.shape or segment_ids.dtype.is_floating_point:
        actual = f"{list(segment_ids.shape)}, {segment_ids.dtype}"
        raise ValueError(f"segment_ids is {actual}: expected integers, {list(loss_mask.shape)}, the shape of loss_mask")
    if bool((segment_ids[loss_mask.bool()] < 0).any()):
        raise ValueError("segment_ids is negative at a token that loss_mask trains: give each trained token an id >= 0")
    return segment_ids.flatten().cpu()


def _options(objective: str | Mapping[str, Option]) -> _Options:
    table: dict[str, object] = {"name": objective} if isinstance(objective, str) else dict(objective)
    if ".py:" in (name := str(table.get("name"))):
        table["name"] = str(Path(name).absolute())
    tables: dict[str, object] = {name: table.pop(name) for name in ("correction", "kl", "entropy") if name in table}
    tables["objective"] = table
    try:
        return _Options.model_validate(tables)
    except ValidationError as error:
        places = {key: "in the objective of policy_loss" for key in leaves(tables)}
        raise ConfigError("; ".join(explain(_Options, tables, places, error))) from None
