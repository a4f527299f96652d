"""Stand-ins with which megatron-core's HybridDeviceOptimizer offloads from a CPU to the same CPU.

It selects parameters by ``is_cuda``, copies them with ``cpu().pin_memory()``, and orders copies with streams and
events. Everything else (selection, copies in both directions, optimizers, state) is megatron-core's own code.
"""

from contextlib import nullcontext

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from megatron_rl.distributed import cpu


class Event:
    """An event of a stream on which all work is synchronous."""

    def wait(self, _stream: object = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""


def pretend_offload() -> None:
    """Replace what the optimizer asks of a GPU, in this process."""
    select = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def selected(self: HybridDeviceOptimizer, fraction: float) -> object:
        copied: set[int] = set()
        keep: list[Tensor] = []

        def to_host(tensor: Tensor) -> Tensor:
            copy = tensor.clone()
            copied.add(id(copy))
            keep.append(copy)
            return copy

        own: dict[str, object] = {"is_cuda": property(lambda tensor: id(tensor) not in copied), "cpu": to_host}
        own["pin_memory"] = lambda tensor: tensor
        for name, value in own.items():
            setattr(Tensor, name, value)
        try:
            return select(self, fraction)
        finally:
            for name in own:
                delattr(Tensor, name)

    setattr(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", selected)  # noqa: B010 (and below: not declared)
    setattr(cpu._NoStream, "record_event", lambda _stream: Event())  # noqa: B010
    setattr(torch.cuda, "stream", lambda _stream: nullcontext())  # noqa: B010
