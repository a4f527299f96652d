"""Imports of the ranks, preloaded once by the process that forks them."""

from megatron_rl.launch.quiet import quiet_upstream

quiet_upstream()

from megatron_rl.prove import rank  # noqa: E402 (after the warning filters)

__all__ = ["rank"]
