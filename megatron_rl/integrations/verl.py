"""Objectives as policy losses of verl 0.9: ``actor.policy_loss.loss_mode = "megatron_rl.espo"``.

verl imports this module on every worker with ``actor_rollout_ref.model.external_lib =
"megatron_rl.integrations.verl"``; importing it registers all objectives with their default options, and ``register``
adds others. verl's settings apply where they have a meaning: ``loss_agg_mode`` is the objective's ``aggregation``, the
global counts of the mini-batch are the denominators, ``rollout_is_weights`` are factors of the costs. ``clip_ratio``
and the like are not read: options are those of ``megatron_rl.policy_loss``.

verl's interface has neither entropies nor token ids nor the engine's log-probs. Objectives that need them get them from
``worker_columns``, and raise a ConfigError without it; bapo, which needs a sum over all ranks, always does. With
``rollout_correction.bypass_mode`` verl's old log-probs are those of the engine.

Legend: B responses of a micro-batch, S padded length.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from verl.trainer.ppo.core_algos import register_policy_loss

from megatron_rl.algorithms.objectives import OBJECTIVES
from megatron_rl.api import Option, Totals, policy_loss
from megatron_rl.errors import ConfigError

PREFIX = "megatron_rl."
"""Prefix of the names of the registered losses: verl has losses of the same names."""
AGGREGATIONS = {
    "token-mean": "token",
    "seq-mean-token-mean": "sequence",
    "seq-mean-token-sum": "sum",
    "seq-mean-token-sum-norm": "constant",
}
"""verl's ``loss_agg_mode`` -> ``aggregation`` of an objective."""


@dataclass(frozen=True)
class WorkerColumns:
    """Inputs of ``policy_loss`` for one micro-batch that verl does not pass to a policy loss, [B, S] each."""

    entropies: Tensor | None = None
    segment_ids: Tensor | None = None
    rollout_logprobs: Tensor | None = None


_current: ContextVar[WorkerColumns | None] = ContextVar("megatron_rl_verl_columns", default=None)


@contextmanager
def worker_columns(
    entropies: Tensor | None = None, segment_ids: Tensor | None = None, rollout_logprobs: Tensor | None = None
) -> Iterator[None]:
    """Give losses inside of a ``with`` block the inputs of a micro-batch that verl does not pass (``policy_loss``)."""
    token = _current.set(WorkerColumns(entropies, segment_ids, rollout_logprobs))
    try:
        yield
    finally:
        _current.reset(token)


class ActorSettings(Protocol):
    """The settings of verl's ``ActorConfig`` that are read."""

    global_batch_info: Mapping[str, int | None]
    loss_scale_factor: int | None
    policy_loss: Mapping[str, object]


VerlLoss = Callable[..., tuple[Tensor, dict[str, float]]]


def register(name: str, objective: str | Mapping[str, Option], vocab_size: int | None = None) -> VerlLoss:
    """Register an objective as the policy loss ``name`` of verl, on this worker, and return the loss.

    Args:
        name: value of ``actor.policy_loss.loss_mode``.
        objective: as in ``megatron_rl.policy_loss``; an ``aggregation`` among its options overrides ``loss_agg_mode``.
        vocab_size: number of token ids of the model; required by espo.
    """
    table: dict[str, Option] = {"name": objective} if isinstance(objective, str) else dict(objective)

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: ActorSettings | None = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        extra = _current.get() or WorkerColumns()
        rollout = old_log_prob if extra.rollout_logprobs is None and _bypasses(config) else extra.rollout_logprobs
        batch_info = {} if config is None else config.global_batch_info
        result = policy_loss(
            _aggregated(table, loss_agg_mode, config, response_mask.shape[-1]),
            logprobs=log_prob,
            old_logprobs=old_log_prob,
            advantages=advantages,
            loss_mask=response_mask.bool(),
            entropies=extra.entropies,
            segment_ids=extra.segment_ids,
            rollout_logprobs=rollout,
            vocab_size=vocab_size,
            totals=_totals(batch_info, response_mask),
            factors=rollout_is_weights,
        )
        metrics = {f"actor/{key}": value for key, value in result.metrics.items()}
        # verl averages gradients over data-parallel ranks.
        return result.loss * (batch_info.get("dp_size") or 1), metrics

    register_policy_loss(name)(loss)
    return loss


def register_all(vocab_size: int | None = None) -> list[str]:
    """Register every objective with its default options as ``megatron_rl.NAME``; return the names."""
    names = [PREFIX + name for name in OBJECTIVES]
    for name, objective in zip(names, OBJECTIVES, strict=True):
        register(name, objective, vocab_size)
    return names


def _totals(batch_info: Mapping[str, int | None], response_mask: Tensor) -> Totals | None:
    """Return verl's global counts; None if it has none, so that the micro-batch counts as the whole mini-batch.

    Raises:
        ConfigError: there are several data-parallel ranks, but verl gives no counts.
    """
    responses, tokens = batch_info.get("global_batch_size"), batch_info.get("batch_num_tokens")
    if responses is None and tokens is None:
        if (batch_info.get("dp_size") or 1) > 1:
            raise ConfigError(
                "verl gives neither batch_num_tokens nor global_batch_size for several data-parallel ranks"
            )
        return None
    mask_BS = response_mask.bool()
    return Totals(
        int(mask_BS.any(-1).sum()) if responses is None else int(responses),
        int(mask_BS.sum()) if tokens is None else int(tokens),
    )


def _aggregated(table: Mapping[str, Option], mode: str, config: ActorSettings | None, width: int) -> dict[str, Option]:
    """Return the objective's options with verl's aggregation, if the objective has that option and does not set it."""
    if mode not in AGGREGATIONS:
        raise ConfigError(f'loss_agg_mode = "{mode}" has no counterpart; write one of {", ".join(AGGREGATIONS)}')
    known = OBJECTIVES.get(str(table["name"]))
    if "aggregation" in table or known is None or "aggregation" not in known.model_fields:
        return dict(table)
    options: dict[str, Option] = {**table, "aggregation": AGGREGATIONS[mode]}
    if mode.endswith("norm"):
        options["normalizer"] = width if config is None else config.loss_scale_factor or width
    return options


def _bypasses(config: ActorSettings | None) -> bool:
    """Return whether verl's old log-probs are those of the rollout engine."""
    correction = None if config is None else config.policy_loss.get("rollout_correction")
    return bool(correction is not None and getattr(correction, "bypass_mode", False))


register_all()
