"""Runs a function on fixed addresses again and again: as a CUDA graph where there is a GPU, else as it is.

Such a function looks at no value from the host, finds and leaves everything at the same addresses, and makes no shape
that depends on a value. Then one launch of the graph stands for the thousands of launches that it was recorded from.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from megatron_rl.distributed.mesh import on_cuda

log = logging.getLogger(__name__)
_WARM_UPS = 3
"""Runs before the recording: libraries make their workspaces and choose their kernels in the first ones."""


class Graphs:
    """Makes functions into graphs, which share one pool of memory: of two graphs only one ever runs."""

    def __init__(self, device: torch.device, wanted: bool = True) -> None:
        self.device = device
        self.capturing = wanted and device.type == "cuda"
        """Whether functions are captured; off after the first that could not be."""
        self._pool: Any = None

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Return what runs the function from now on. It is run a few times for that, which must do no harm."""
        if not self.capturing:
            return function
        try:
            return self._captured(function)
        except RuntimeError as error:  # all that torch says of CUDA, out of memory included
            self.capturing = False
            log.warning("decoding goes on without CUDA graphs, slower: a step could not be captured: %s", error)
            return function

    def _captured(self, function: Callable[[], None]) -> Callable[[], None]:
        current, aside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                function()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads of a server may speak to the device meanwhile; only this one's calls are recorded or refused.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        self._pool = graph.pool()
        return graph.replay


def serving_device() -> torch.device:
    """Return where an embedded server has its model: the first GPU that it sees, or the CPU; see ``on_cuda``."""
    return torch.device("cuda", 0) if on_cuda() else torch.device("cpu")
