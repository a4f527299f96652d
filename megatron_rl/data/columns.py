"""The schema of a batch: every per-token and per-response column, with its dtype, its writer and its readers.

``Batch`` rejects columns that are not listed in ``COLUMNS``, so a new column starts with an entry there. An objective
may add unlisted columns ``extra_NAME_T``, floating-point or integer, that only its ``cost`` reads, and a correction
``extra_gate_NAME_T``, from which the loss computes metrics.

Legend: T all tokens of the batch, prompts included, B responses, L layers with experts, K experts per token, Q ids of
a token's sampling mask.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError

FLOAT = (torch.float32, torch.float64)
INTEGER = (torch.int64,)
BOOLEAN = (torch.bool,)
ROUTES = (torch.uint8, torch.int16)

ROUTE_COLUMNS = ("rollout_routes_T", "routes_T")
"""Columns [T, L, K]. In a mini-batch on a rank, L are the layers with experts that the rank has."""

EXTRA = "extra_"
"""Prefix of objective-specific columns: ``cost`` reads ``extra_NAME_T`` as ``LossInputs.extra["NAME"]``."""


@dataclass(frozen=True)
class ColumnSpec:
    """Schema of one column of a batch.

    Attributes:
        name: ends in ``_T`` (one entry per token) or ``_B`` (one entry per response).
        dtypes: the accepted dtypes.
        writer: module, relative to ``megatron_rl``, that writes the column.
        readers: modules that read it, from the batch or as a field of ``LossInputs``.
        meaning: values and unit.
        missing: text for the error message if the column is required but missing: which code writes it.
        trailing: names of the dimensions after the first, such as ``("L", "K")``.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    writer: str
    readers: tuple[str, ...]
    meaning: str
    missing: str = ""
    trailing: tuple[str, ...] = ()


COLUMNS: Mapping[str, ColumnSpec] = {
    column.name: column
    for column in (
        # Written from the sampled responses.
        ColumnSpec(
            "input_ids_T",
            INTEGER,
            "rollout.collect",
            ("policy.rows", "observability.token_record", "algorithms.objectives.sspo"),
            "token ids of prompts and responses",
            "rollouts write it",
        ),
        ColumnSpec(
            "loss_mask_T",
            BOOLEAN,
            "rollout.collect",
            ("data.types", "policy.rows", "observability.token_record"),
            "True on trained tokens: those that the policy sampled",
        ),
        ColumnSpec(
            "rollout_logprobs_T",
            FLOAT,
            "rollout.collect",
            (
                "algorithms.correction",
                "algorithms.gates",
                "algorithms.objectives.base",
                "algorithms.objectives.dppo",
                "observability.mismatch_causes",
            ),
            "log-probability that the rollout engine reported, in nats; 0 on prompts",
            "rollouts write it; policy_loss takes it as rollout_logprobs",
        ),
        ColumnSpec(
            "weight_versions_T",
            INTEGER,
            "rollout.collect",
            ("data.types", "observability.mismatch_causes", "observability.mismatch_report"),
            "version of the weights that sampled the token, -1 where it was not sampled",
        ),
        ColumnSpec(
            "rollout_routes_T",
            ROUTES,
            "rollout.routes",
            ("policy.routing_replay",),
            "experts that the rollout engine chose",
            trailing=("L", "K"),
        ),
        ColumnSpec(
            "rollout_routed_T",
            BOOLEAN,
            "rollout.routes",
            ("policy.routing_replay", "observability.routing_statistics"),
            "True where the rollout engine reported its experts",
        ),
        ColumnSpec(
            "mask_ids_T",
            (torch.int32,),
            "rollout.sampling_masks",
            ("policy.rows",),
            "token ids that top_p and top_k left to sample from, -1 as padding; only -1 where the engine reported none",
            trailing=("Q",),
        ),
        ColumnSpec(
            "sample_index_B",
            INTEGER,
            "rollout.collect",
            ("observability.token_record", "observability.mismatch_report", "policy.nonfinite"),
            "index of the response among all of the step, as in rollouts.jsonl",
        ),
        ColumnSpec(
            "rewards_B",
            FLOAT,
            "rollout.collect",
            ("observability.step_metrics", "observability.token_record"),
            "reward; 0 where the verifier gave none",
        ),
        ColumnSpec(
            "verified_B",
            BOOLEAN,
            "rollout.collect",
            ("observability.step_metrics", "observability.token_record"),
            "True where the verifier gave a reward",
        ),
        ColumnSpec(
            "truncated_B",
            BOOLEAN,
            "rollout.collect",
            ("observability.step_metrics", "algorithms.correction"),
            "True where the response reached the token limit",
        ),
        ColumnSpec(
            "group_ids_B",
            INTEGER,
            "rollout.collect",
            ("rollout.collect", "observability.step_metrics"),
            "index of the response's prompt among those of the step",
        ),
        ColumnSpec(
            "advantages_B",
            FLOAT,
            "rollout.collect",
            ("algorithms.tokens", "observability.token_record"),
            "advantage of the response",
            "rollouts write it; policy_loss takes it as advantages",
        ),
        ColumnSpec(
            "arm_alphas_B",
            FLOAT,
            "rollout.collect",
            ("algorithms.arm",),
            "advantage.arm_alpha where ARM changes the advantage: verified responses of groups with a signal; else 0",
        ),
        ColumnSpec(
            "pruning_weights_B",
            FLOAT,
            "rollout.collect",
            ("algorithms.pruning", "algorithms.loss", "observability.step_metrics"),
            "factor of the response's term in the loss; 0 where advantage.pruning drops the response",
        ),
        # Written by ``drop_pruned``, on the first response that it leaves of a mini-batch; 0 on the others.
        ColumnSpec(
            "unpruned_responses_B", INTEGER, "algorithms.pruning", ("algorithms.tokens",), "responses before pruning"
        ),
        ColumnSpec(
            "unpruned_tokens_B", INTEGER, "algorithms.pruning", ("algorithms.tokens",), "trained tokens before pruning"
        ),
        # Written by ``Batch.outline``, from the per-token columns.
        ColumnSpec(
            "trained_tokens_B",
            INTEGER,
            "data.types",
            ("data.types",),
            "number of trained tokens",
        ),
        ColumnSpec(
            "oldest_versions_B",
            INTEGER,
            "data.types",
            ("observability.step_metrics",),
            "lowest weight version of the response's tokens; the largest int64 if none is known",
        ),
        ColumnSpec(
            "newest_versions_B",
            INTEGER,
            "data.types",
            ("observability.step_metrics",),
            "highest weight version of the response's tokens; -1 if none is known",
        ),
        ColumnSpec(
            "known_versions_B",
            INTEGER,
            "data.types",
            ("observability.step_metrics",),
            "number of tokens whose weight version is known",
        ),
        ColumnSpec(
            "version_sums_B",
            INTEGER,
            "data.types",
            ("observability.step_metrics",),
            "sum of the known weight versions over the tokens",
        ),
        # Written by the policy's forward pass before the update.
        ColumnSpec(
            "old_logprobs_T",
            FLOAT,
            "policy.engine",
            ("algorithms.loss", "algorithms.correction", "observability.mismatch_causes"),
            "log-probability under the policy before the update, in nats; 0 where not trained",
            "the policy writes it when it computes log-probs; policy_loss takes it as old_logprobs",
        ),
        ColumnSpec(
            "old_entropies_T",
            FLOAT,
            "policy.engine",
            ("algorithms.tokens", "observability.step_metrics", "observability.token_record"),
            "entropy of the policy before the update, in nats; 0 where not trained",
            "the policy writes it when it computes log-probs; policy_loss takes it as entropies",
        ),
        ColumnSpec(
            "current_logprobs_T",
            FLOAT,
            "policy.engine",
            ("algorithms.objectives.bapo", "algorithms.gates", "algorithms.correction"),
            "log-probability under the weights that the update starts from, in nats; 0 where not trained",
            "the policy writes it for objectives that read it, except before the first update of a step",
        ),
        ColumnSpec(
            "ref_logprobs_T",
            FLOAT,
            "policy.engine",
            ("algorithms.loss",),
            "log-probability under the frozen reference policy, in nats; 0 where not trained",
            "the policy writes it if kl.coefficient is above 0; policy_loss takes it as ref_logprobs",
        ),
        ColumnSpec(
            "routes_T",
            ROUTES,
            "policy.routing_replay",
            ("policy.routing_replay",),
            "experts that the policy chose when it computed log-probs (routing_replay r2)",
            trailing=("L", "K"),
        ),
        ColumnSpec(
            "routing_differs_T",
            (torch.int32,),
            "policy.routing_replay",
            ("observability.routing_statistics",),
            "layers in which policy and rollout engine chose different experts",
        ),
        # Written by ``prepare``: independent of the current weights.
        ColumnSpec(
            "advantages_T",
            FLOAT,
            "algorithms.objectives.base",
            ("algorithms.loss", "algorithms.objectives.base", "algorithms.tokens"),
            "advantage of the token's response",
            "Objective.prepare writes it from advantages_B",
        ),
        ColumnSpec(
            "response_shares_T",
            FLOAT,
            "algorithms.objectives.base",
            ("algorithms.loss",),
            "1 / trained tokens of the response",
            "Objective.prepare writes it",
        ),
        ColumnSpec(
            "weights_T",
            FLOAT,
            "algorithms.objectives.base",
            ("algorithms.loss",),
            "weight of the token in the loss, from global counts",
            "the objective's columns() must return it; algorithms.loss.prepare adds it to a batch",
        ),
        ColumnSpec(
            "segment_ids_T",
            INTEGER,
            "algorithms.objectives.base",
            ("algorithms.segments", "algorithms.gates", "observability.token_record"),
            "tokens with the same id share an importance ratio; -1 where not trained",
            "the objective's columns() may return it; policy_loss takes it as segment_ids",
        ),
        ColumnSpec(
            "clip_low_T",
            FLOAT,
            "algorithms.objectives.base",
            ("algorithms.objectives.base", "observability.token_record"),
            "the ratio may fall to 1 - clip_low",
            "the objective's columns() must return it",
        ),
        ColumnSpec(
            "clip_high_T",
            FLOAT,
            "algorithms.objectives.base",
            ("algorithms.objectives.base", "observability.token_record"),
            "the ratio may rise to 1 + clip_high",
            "the objective's columns() must return it",
        ),
        ColumnSpec(
            "factors_T",
            FLOAT,
            "algorithms.objectives.base",
            ("algorithms.loss",),
            "factor of the token's cost, 0 where the objective drops the token",
            "the objective's columns() may return it",
        ),
        ColumnSpec(
            "entropy_coefficients_T",
            FLOAT,
            "algorithms.entropy",
            ("algorithms.loss",),
            "coefficient of the entropy bonus, the same number at every token",
            "algorithms.loss.prepare writes it if entropy.coefficient or entropy.target is set",
        ),
        ColumnSpec(
            "corrections_T",
            FLOAT,
            "algorithms.correction",
            ("algorithms.loss",),
            "weight that corrects the mismatch of rollout engine and trainer",
            "algorithms.loss.prepare writes it if correction.kind is not none",
        ),
        # Written by the loss for the token record.
        ColumnSpec(
            "new_logprobs_T",
            FLOAT,
            "algorithms.loss",
            ("observability.token_record",),
            "log-probability under the weights of the update, in nats",
        ),
        ColumnSpec(
            "log_ratios_T",
            FLOAT,
            "algorithms.loss",
            ("observability.token_record",),
            "log importance ratio of the token's segment",
        ),
        ColumnSpec(
            "clipped_T",
            FLOAT,
            "algorithms.loss",
            ("observability.token_record",),
            "1 where the trust region took the token out of the gradient, else 0",
        ),
        # Written by ``prove``.
        ColumnSpec(
            "noise_T",
            FLOAT,
            "prove.case",
            ("prove.case",),
            "noise added to the old log-probs, so that ratios differ from 1",
        ),
    )
}


def check_columns(lengths_B: Tensor, columns: Mapping[str, Tensor]) -> None:
    """Check the names, dtypes and shapes of the columns of a batch.

    Args:
        lengths_B: int64, tokens of each sequence.
        columns: the columns by name.

    Raises:
        ConfigError: a column is not in the schema, or its dtype or shape does not match the schema.
    """
    sizes = {"T": int(lengths_B.sum()), "B": len(lengths_B)}
    for name, tensor in columns.items():
        column = COLUMNS.get(name)
        if column is None and not (name.startswith(EXTRA) and name.endswith("_T")):
            raise ConfigError(
                f"a batch has no column {name}: objective-specific columns are named {EXTRA}NAME_T, all others are"
                " listed in megatron_rl/data/columns.py"
            )
        size, trailing = sizes[name.rpartition("_")[2]], () if column is None else column.trailing
        if tensor.shape[:1] != (size,) or tensor.dim() != 1 + len(trailing):
            expected = ", ".join([str(size), *trailing])
            raise ConfigError(f"the column {name} has shape {list(tensor.shape)}, expected [{expected}]")
        if column is not None and tensor.dtype not in column.dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in column.dtypes)
            raise ConfigError(f"the column {name} is {str(tensor.dtype).removeprefix('torch.')}, expected {expected}")
