"""Imported once by the process that forks the runs: a run then starts in a second, not in ten."""

import torch

from megatron_rl.launch.quiet import quiet_upstream

quiet_upstream()

from megatron_rl.inference_server import serve, server  # noqa: E402
from megatron_rl.launch import local  # noqa: E402 (after the filters)
from megatron_rl.train import rank  # noqa: E402

torch.set_num_threads(1)

__all__ = ["local", "rank", "serve", "server"]
