"""The buffer in a checkpoint: finished groups as they are; groups in the making as orders that are given once more."""

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
    """Return the buffer as JSON; prompts are not in it, only where they stand in the stream."""
    return {
        "next_prompt": buffer.position,
        "plans": [{"step": step, **_plan(plan)} for step, plan in sorted(buffer.plans.items())],
    }


def restore(buffer: Buffer, state: Json, prompts: PromptSource) -> None:
    """Bring a new buffer to a state that was saved; what was in the making is ordered again, with the same seeds."""
    buffer.position = state["next_prompt"]
    for saved in state.get("plans", []):
        plan = StepPlan(saved["positions"], rounds=saved["rounds"], refills=saved["refills"])
        plan.orders = {number: tuple(places) for number, places, _ in saved["orders"]}
        plan.coming = {place: number for number, _, coming in saved["orders"] for place in coming}
        apart = buffer.demand.apart
        plan.held = {place: _held(entry, prompts[plan.positions[place]], apart) for place, entry in saved["held"]}
        plan.dropped = [DroppedGroup(_held(entry, prompts[at], apart), why, at) for at, entry, why in saved["dropped"]]
        buffer.plans[saved["step"]] = plan


def _plan(plan: StepPlan) -> Json:
    return {
        "positions": plan.positions,
        "rounds": plan.rounds,
        "refills": plan.refills,
        "orders": [
            [number, list(places), [place for place in places if plan.coming.get(place) == number]]
            for number, places in plan.orders.items()
        ],
        "held": [[place, _entry(held)] for place, held in sorted(plan.held.items())],
        "dropped": [[dropped.position, _entry(dropped.held), dropped.why] for dropped in plan.dropped],
    }


def _entry(held: FinishedGroup) -> Json:
    return {
        "responses": [_saved(response) for response in held.group.responses],
        "verdicts": [asdict(verdict) for verdict in held.verdicts],
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


def _held(entry: Json, prompt: Prompt, apart: bool) -> FinishedGroup:
    responses = tuple(_response(saved) for saved in entry["responses"])
    return FinishedGroup(Group(prompt, responses), tuple(Verdict(**verdict) for verdict in entry["verdicts"]), apart)


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
