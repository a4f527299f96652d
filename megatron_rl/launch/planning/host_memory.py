"""Host memory of a step's token columns: on every rank its own replica's, in the controller the whole step."""

from dataclasses import dataclass

from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.layout import ParallelLayout
from megatron_rl.launch.planning.stages import pipeline_stages
from megatron_rl.models.hf_mapping.rules import Family

SAMPLED_BYTES = 8 + 1 + 4 + 8
"""Token id, mask, log-prob of the engine and weight version."""

SCORED_BYTES = 4 + 4
"""Log-prob and entropy of the old policy, float32."""

PREPARED_BYTES = 3 * 4 + 2 * 4 + 8 + 4
"""Advantage, share and weight; clip window; segment; correction. For one mini-batch at a time."""

RESPONSE_BYTES = 2 * 4 + 5
"""Ids, log-probs and text of a response per token, in the controller."""


@dataclass(frozen=True)
class HostColumns:
    """Bytes of host memory that a step's token columns take.

    Attributes:
        per_token: bytes per token of the rank's own responses, for the pipeline stage with most layers with experts.
        local: bytes on every rank.
        main: bytes of the controller, on the main rank's host, until the other ranks have fetched their columns.
    """

    per_token: int
    local: int
    main: int


def host_columns(run: Run, family: Family, layout: ParallelLayout, tokens: int) -> HostColumns:
    """Return the host memory of a step of ``tokens`` tokens, prompts included."""
    stages = pipeline_stages(family.num_layers, layout)
    routed = (
        [len(set(stage.layers) & set(family.route_shape.layers)) for stage in stages] if family.num_experts else [0]
    )
    reference = 4 if run.kl.coefficient else 0
    scored = SAMPLED_BYTES + SCORED_BYTES + reference + _route_bytes(run, family, max(routed))
    share = tokens / layout.data
    local = share * scored + share / run.train.updates_per_step * PREPARED_BYTES
    sampled = SAMPLED_BYTES + RESPONSE_BYTES
    if run.rollout.routing_replay in ("report", "r3"):
        sampled += 2 * _route_bytes(run, family, sum(routed))  # of the responses, and collated
    return HostColumns(scored, round(local), tokens * sampled)


def _route_bytes(run: Run, family: Family, layers: int) -> int:
    """Return the bytes per token of routes: a column [L, K], whether it is known, and in how many layers it differs."""
    mode = run.rollout.routing_replay
    if mode == "none" or not family.num_experts:
        return 0
    shape = family.route_shape
    each = layers * shape.per_token * (1 if shape.dtype == "uint8" else 2)
    return each if mode == "r2" else each + 1 + 4
