"""Batches: groups and verdicts collated into columns.

Legend: T tokens, B responses.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import advantages, gdpo
from megatron_rl.algorithms.arm import arm_alphas
from megatron_rl.algorithms.pruning import drop_probabilities, pruned_weights
from megatron_rl.config.schema import Run
from megatron_rl.data.types import Batch, Columns, Group, Prompt, Response, fold_seed
from megatron_rl.rollout.routes import requested_routes, route_columns
from megatron_rl.rollout.sampling_masks import mask_columns
from megatron_rl.tasks.base import Verdict

PRUNING_DRAW = 7
"""Distinguishes the random numbers of pruning from others with the same seed and step."""


def collect(groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]], run: Run) -> Batch:
    """Return all responses as one batch with rewards and advantages.

    Columns: those of ``token_columns``; ``sample_index_B``, the index of the response among all responses of the step,
    as in ``rollouts.jsonl``; ``rewards_B``; ``verified_B``; ``truncated_B``; ``group_ids_B``, the index of the group;
    ``advantages_B``. If the engine returns the experts it chose, also the columns of ``route_columns``;
    with ``rollout.sampling.keep_mask``, ``mask_ids_T``; with ``advantage.arm_alpha``, ``arm_alphas_B``.
    """
    samples = [(group.prompt, response) for group in groups for response in group.responses]
    responses = [response for _, response in samples]
    lengths = [len(prompt.input_ids) + len(response.output_ids) for prompt, response in samples]
    flat = [verdict for group_verdicts in verdicts for verdict in group_verdicts]
    rewards_B = torch.tensor([verdict.score or 0.0 for verdict in flat], dtype=torch.float64)
    verified_B = torch.tensor([verdict.score is not None for verdict in flat])
    group_ids_B = torch.tensor([number for number, group in enumerate(groups) for _ in group.responses])
    columns = {
        **token_columns(samples, lengths),
        "sample_index_B": torch.arange(len(responses)),
        "rewards_B": rewards_B,
        "verified_B": verified_B,
        "truncated_B": torch.tensor([response.finish_reason == "length" for response in responses]),
        "group_ids_B": group_ids_B,
        "advantages_B": _advantages(run, flat, rewards_B, group_ids_B, verified_B, _sampled_tokens(responses)),
    }
    if alpha := run.advantage.arm_alpha:
        columns["arm_alphas_B"] = arm_alphas(columns["advantages_B"], group_ids_B, verified_B, alpha)
    if (shape := requested_routes(run)) is not None:
        columns |= route_columns(responses, lengths, shape)
    if run.rollout.sampling.keep_mask:
        columns |= mask_columns(responses, lengths)
    batch = Batch(torch.tensor(lengths), columns)
    return drop_zero_advantage_groups(batch) if run.train.filter_zero_variance else batch


def add_pruning(batch: Batch, run: Run, step: int) -> Batch:
    """Return the batch with ``pruning_weights_B``, drawn from the seed and the step; unchanged without pruning."""
    if not run.advantage.pruning:
        return batch
    generator = torch.Generator().manual_seed(fold_seed((run.train.seed, step, PRUNING_DRAW)))
    drawn_B = torch.rand(len(batch), generator=generator, dtype=torch.float64)
    probabilities_B = drop_probabilities(batch["advantages_B"], run.advantage.pruning)
    return batch.add({"pruning_weights_B": pruned_weights(probabilities_B, drawn_B >= probabilities_B)})


def token_columns(samples: Sequence[tuple[Prompt, Response]], lengths: Sequence[int]) -> Columns:
    """Return the columns of prompts and responses laid end to end, without a Python loop over tokens.

    ``input_ids_T``; ``loss_mask_T``, True on sampled tokens; ``rollout_logprobs_T``, 0 on prompts;
    ``weight_versions_T``, the version of the weights that sampled a token, -1 if it is unknown or the token was not
    sampled.
    """
    total = sum(lengths)
    input_ids_T, versions_T = np.empty(total, np.int64), np.full(total, -1, np.int64)
    mask_T, logprobs_T = np.zeros(total, np.bool_), np.zeros(total, np.float32)
    start = 0
    for (prompt, response), length in zip(samples, lengths, strict=True):
        output = slice(start + len(prompt.input_ids), start + length)
        input_ids_T[start : output.start], input_ids_T[output] = prompt.input_ids, response.output_ids
        mask_T[output], logprobs_T[output] = True, response.logprobs
        for version, first, end in response.weight_versions:
            versions_T[output][first:end] = version
        for first, end in response.observed:  # a span of one version may include observed tokens
            mask_T[output][first:end], versions_T[output][first:end] = False, -1
        start += length
    columns = {"input_ids_T": input_ids_T, "loss_mask_T": mask_T, "rollout_logprobs_T": logprobs_T}
    return {name: torch.from_numpy(column) for name, column in (columns | {"weight_versions_T": versions_T}).items()}


def _advantages(
    run: Run,
    verdicts: Sequence[Verdict],
    rewards_B: Tensor,
    group_ids_B: Tensor,
    verified_B: Tensor,
    tokens_B: Tensor,
) -> Tensor:
    kind, names = run.advantage.kind, run.reward.names
    if kind != "gdpo":
        return advantages(kind, rewards_B, group_ids_B, verified_B, tokens_B)
    rows = [[verdict.rewards.get(name, 0.0) for name in names] for verdict in verdicts]
    weights = torch.tensor(run.reward.weights_in_order, dtype=torch.float64)
    whitened_over = tokens_B if run.advantage.whiten_over == "tokens" else None
    return gdpo(torch.tensor(rows, dtype=torch.float64), group_ids_B, weights, verified_B, whitened_over)


def _sampled_tokens(responses: Sequence[Response]) -> Tensor:
    """Return the number of sampled tokens of each response, int64 [B]."""
    return torch.tensor([len(r.output_ids) - sum(end - start for start, end in r.observed) for r in responses])


def drop_zero_advantage_groups(batch: Batch) -> Batch:
    """Drop groups whose advantages are all zero, unless that would drop the whole batch."""
    signal = torch.zeros(int(batch["group_ids_B"].max()) + 1, dtype=torch.bool)
    signal[batch["group_ids_B"][batch["advantages_B"] != 0]] = True
    indices = signal[batch["group_ids_B"]].nonzero().flatten()
    return batch.select(indices) if len(indices) else batch
