"""The buffer in a checkpoint: finished groups are saved whole, groups in progress as orders that are repeated."""

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rl.data.prompts import PromptSource
from megatron_rl.data.types import Group, Prompt, Response
from megatron_rl.rollout.buffer import Buffer, DroppedGroup, FinishedGroup, StepPlan
from megatron_rl.tasks.base import Verdict

Json = Mapping[str, Any]


def snapshot(buffer: Buffer) -> Json:
    """Return the buffer as JSON; of the prompts it holds only their positions in the stream."""
    return {
        "next_prompt": buffer.next_position,
        "plans": [{"step": step, **_plan(plan)} for step, plan in sorted(buffer.plans.items())],
    }


def restore(buffer: Buffer, state: Json, prompts: PromptSource) -> None:
    """Restore a saved state into a new buffer; groups in progress are ordered again, with the same seeds."""
    buffer.next_position = state["next_prompt"]
    for saved in state.get("plans", []):
        plan = StepPlan(saved["positions"], rounds=saved["rounds"], resample_rounds=saved["refills"])
        plan.orders = {number: tuple(slots) for number, slots, _ in saved["orders"]}
        plan.pending = {slot: number for number, _, pending in saved["orders"] for slot in pending}
        separate = buffer.config.separate_rewards
        for slot, entry in saved["held"]:
            plan.finished[slot] = _finished(entry, prompts[plan.positions[slot]], separate)
        for position, entry, fate in saved["dropped"]:
            plan.dropped.append(DroppedGroup(_finished(entry, prompts[position], separate), fate, position))
        buffer.plans[saved["step"]] = plan


def _plan(plan: StepPlan) -> Json:
    return {
        "positions": plan.positions,
        "rounds": plan.rounds,
        "refills": plan.resample_rounds,
        "orders": [
            [number, list(slots), [slot for slot in slots if plan.pending.get(slot) == number]]
            for number, slots in plan.orders.items()
        ],
        "held": [[slot, _entry(finished)] for slot, finished in sorted(plan.finished.items())],
        "dropped": [[dropped.position, _entry(dropped.finished), dropped.fate] for dropped in plan.dropped],
    }


def _entry(finished: FinishedGroup) -> Json:
    return {
        "responses": [_saved(response) for response in finished.group.responses],
        "verdicts": [asdict(verdict) for verdict in finished.verdicts],
    }


def _saved(response: Response) -> Json:
    routes = response.routes
    packed = None
    if routes is not None:
        packed = [str(routes.numpy().dtype), list(routes.shape), b64encode(routes.numpy().tobytes()).decode("ascii")]
    return {**asdict(replace(response, routes=None)), "routes": packed}


def _routes(saved: Sequence[Any] | None) -> Tensor | None:
    if saved is None:
        return None
    dtype, shape, data = saved
    return torch.from_numpy(np.frombuffer(b64decode(data), dtype=dtype).reshape(shape).copy())


def _finished(entry: Json, prompt: Prompt, separate_rewards: bool) -> FinishedGroup:
    responses = tuple(_response(saved) for saved in entry["responses"])
    verdicts = tuple(Verdict(**verdict) for verdict in entry["verdicts"])
    return FinishedGroup(Group(prompt, responses), verdicts, separate_rewards)


def _response(saved: Json) -> Response:
    return Response(
        id=saved["id"],
        prompt_id=saved["prompt_id"],
        index=saved["index"],
        output_ids=tuple(saved["output_ids"]),
        logprobs=tuple(saved["logprobs"]),
        text=saved["text"],
        finish_reason=saved["finish_reason"],
        weight_versions=tuple((version, start, end) for version, start, end in saved["weight_versions"]),
        routes=_routes(saved["routes"]),
        observed=tuple((start, end) for start, end in saved.get("observed", ())),
        last_turn=saved.get("last_turn"),
    )
