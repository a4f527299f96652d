"""The parts that sample and verify responses."""

from dataclasses import dataclass

from megatron_rl.fleet.fleet import Fleet
from megatron_rl.tasks.base import Task
from megatron_rl.tasks.pool import Verifier


@dataclass(frozen=True)
class RolloutBackend:
    """The fleet, the task and its verifier. Only the controller has one."""

    fleet: Fleet
    task: Task
    verifier: Verifier
