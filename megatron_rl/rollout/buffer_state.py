"""The buffer in a checkpoint: finished groups are saved whole, groups in progress as orders that are repeated."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_rl.data.prompts import PromptSource
from megatron_rl.data.types import Group, Prompt, Response
from megatron_rl.errors import ConfigError
from megatron_rl.rollout.buffer import Buffer, DroppedGroup, FinishedGroup, SampleOrder, StepPlan
from megatron_rl.rollout.completion import CompletedGroup, CompletionBuffer
from megatron_rl.tasks.base import Verdict

Json = Mapping[str, Any]


def snapshot(buffer: Buffer | CompletionBuffer) -> Json:
    """Return the buffer as JSON; of the prompts it holds only their positions in the stream."""
    if isinstance(buffer, CompletionBuffer):
        return {"next_prompt": buffer.next_position, "completion": _completion(buffer)}
    return {
        "next_prompt": buffer.next_position,
        "plans": [{"step": step, **_plan(plan)} for step, plan in sorted(buffer.plans.items())],
    }


def restore(buffer: Buffer | CompletionBuffer, state: Json, prompts: PromptSource) -> None:
    """Restore a saved state into a new buffer; groups in progress are ordered again, with the same seeds.

    Raises:
        ConfigError: the state is of a run with another ``rollout.order``.
    """
    is_completion = isinstance(buffer, CompletionBuffer)
    # A synchronous run holds nothing between steps, so its state says nothing about the order.
    if is_completion != ("completion" in state) and (state.get("plans") or "completion" in state):
        raise ConfigError("rollout.order of the checkpoint is another one; resume with the order that the run had")
    buffer.next_position = state["next_prompt"]
    if isinstance(buffer, CompletionBuffer):
        _restore_completion(buffer, state.get("completion", {}), prompts)
        return
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


def _completion(buffer: CompletionBuffer) -> Json:
    orders = buffer.orders_in_progress.values()
    return {
        "step": buffer.next_step,
        "rounds": buffer.rounds,
        "replacements": buffer.replacements,
        "repeats": buffer.repeats,
        "orders": [[order.step, order.round, list(order.positions), list(order.missing)] for order in orders],
        "held": [[entry.position, entry.is_replaced, _entry(entry.finished)] for entry in buffer.completed],
        "dropped": [[dropped.position, _entry(dropped.finished), dropped.fate] for dropped in buffer.dropped],
    }


def _restore_completion(buffer: CompletionBuffer, saved: Json, prompts: PromptSource) -> None:
    if not saved:
        return
    separate = buffer.config.separate_rewards
    buffer.next_step, buffer.rounds, buffer.replacements = saved["step"], saved["rounds"], saved["replacements"]
    buffer.repeats = list(saved["repeats"])
    for step, number, positions, missing in saved["orders"]:
        slots = tuple(range(len(positions)))
        buffer.orders_in_progress[number] = SampleOrder(step, number, tuple(positions), slots, tuple(missing))
    for position, is_replaced, entry in saved["held"]:
        buffer.completed.append(CompletedGroup(position, _finished(entry, prompts[position], separate), is_replaced))
    for position, entry, fate in saved["dropped"]:
        buffer.dropped.append(DroppedGroup(_finished(entry, prompts[position], separate), fate, position))


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
        "responses": [response.to_json() for response in finished.group.responses],
        "verdicts": [asdict(verdict) for verdict in finished.verdicts],
    }


def _finished(entry: Json, prompt: Prompt, separate_rewards: bool) -> FinishedGroup:
    responses = tuple(Response.from_json(saved) for saved in entry["responses"])
    verdicts = tuple(Verdict(**verdict) for verdict in entry["verdicts"])
    return FinishedGroup(Group(prompt, responses), verdicts, separate_rewards)
