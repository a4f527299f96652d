"""Batches: groups and verdicts collated into columns, and broadcast to every rank.

Legend: T tokens, B responses.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import advantages, gdpo
from megatron_rl.config.schema import Run
from megatron_rl.data.types import Batch, Group, Response
from megatron_rl.distributed.collectives import broadcast_json, broadcast_tensor
from megatron_rl.distributed.mesh import World
from megatron_rl.rollout.routes import requested_routes, route_columns
from megatron_rl.tasks.base import Verdict


def collect(groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]], run: Run) -> Batch:
    """Return all responses as one batch with rewards and advantages.

    Columns: ``input_ids_T``; ``loss_mask_T``, True on sampled tokens; ``rollout_logprobs_T``, 0 on prompts;
    ``weight_versions_T``, the version of the weights that sampled a token, -1 on prompts; ``sample_index_B``, the index
    of the response among all responses of the step, as in ``rollouts.jsonl``; ``rewards_B``; ``verified_B``;
    ``truncated_B``; ``group_ids_B``, the index of the group; ``advantages_B``. If the engine returns the experts it
    chose, also the columns of ``route_columns``.
    """
    responses = [
        (number, group.prompt, response) for number, group in enumerate(groups) for response in group.responses
    ]
    input_ids: list[int] = []
    masks: list[bool] = []
    logprobs: list[float] = []
    versions: list[int] = []
    lengths: list[int] = []
    for _, prompt, response in responses:
        input_ids += [*prompt.input_ids, *response.output_ids]
        masks += [False] * len(prompt.input_ids) + list(response.sampled)
        logprobs += [0.0] * len(prompt.input_ids) + list(response.logprobs)
        versions += [-1] * len(prompt.input_ids) + token_versions(response)
        lengths.append(len(prompt.input_ids) + len(response.output_ids))
    flat = [verdict for group_verdicts in verdicts for verdict in group_verdicts]
    rewards_B = torch.tensor([verdict.score or 0.0 for verdict in flat], dtype=torch.float64)
    verified_B = torch.tensor([verdict.score is not None for verdict in flat])
    group_ids_B = torch.tensor([number for number, _, _ in responses])
    columns = {
        "input_ids_T": torch.tensor(input_ids),
        "loss_mask_T": torch.tensor(masks),
        "rollout_logprobs_T": torch.tensor(logprobs, dtype=torch.float32),
        "weight_versions_T": torch.tensor(versions),
        "sample_index_B": torch.arange(len(responses)),
        "rewards_B": rewards_B,
        "verified_B": verified_B,
        "truncated_B": torch.tensor([response.finish_reason == "length" for _, _, response in responses]),
        "group_ids_B": group_ids_B,
        "advantages_B": _advantages(run, flat, rewards_B, group_ids_B, verified_B),
    }
    if (shape := requested_routes(run)) is not None:
        columns |= route_columns([response for _, _, response in responses], lengths, shape)
    batch = Batch(torch.tensor(lengths), columns)
    return drop_zero_advantage_groups(batch) if run.train.filter_zero_variance else batch


def _advantages(
    run: Run, verdicts: Sequence[Verdict], rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor
) -> Tensor:
    kind, names = run.advantage.kind, run.reward.names
    if kind != "gdpo":
        return advantages(kind, rewards_B, group_ids_B, verified_B)
    rows = [[verdict.rewards.get(name, 0.0) for name in names] for verdict in verdicts]
    weights = torch.tensor(run.reward.weights_in_order, dtype=torch.float64)
    return gdpo(torch.tensor(rows, dtype=torch.float64), group_ids_B, weights, verified_B)


def token_versions(response: Response) -> list[int]:
    """Return the weight version of each output token; -1 if it is unknown or the token was not sampled."""
    versions = [-1] * len(response.output_ids)
    for version, start, end in response.weight_versions:
        versions[start:end] = [version] * (min(end, len(versions)) - start)
    for start, end in response.observed:  # a span of one version may include observed tokens
        versions[start:end] = [-1] * (end - start)
    return versions


def drop_zero_advantage_groups(batch: Batch) -> Batch:
    """Drop groups whose advantages are all zero, unless that would drop the whole batch."""
    signal = torch.zeros(int(batch["group_ids_B"].max()) + 1, dtype=torch.bool)
    signal[batch["group_ids_B"][batch["advantages_B"] != 0]] = True
    indices = signal[batch["group_ids_B"]].nonzero().flatten()
    return batch.select(indices) if len(indices) else batch


def broadcast_batch(batch: Batch | None, world: World) -> Batch | None:
    """Return the main rank's batch, or its None, on every rank. Collective."""
    sent: Mapping[str, Tensor] = {} if batch is None else {"lengths_B": batch.lengths_B, **batch.columns}
    described = [[name, list(column.shape), str(column.dtype).removeprefix("torch.")] for name, column in sent.items()]
    received = broadcast_json(None if batch is None else described, source=0, device=world.device)
    header = cast(list[tuple[str, list[int], str]] | None, received)
    if header is None:
        return None
    columns = {
        name: broadcast_tensor(sent.get(name), tuple(shape), getattr(torch, dtype), source=0, device=world.device)
        for name, shape, dtype in header
    }
    return Batch(columns.pop("lengths_B"), columns)
