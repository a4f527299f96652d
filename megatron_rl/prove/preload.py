"""Imported once by the process that forks the ranks: what they need, megatron-core first of all, is then in memory."""

from megatron_rl.launch.quiet import quiet_upstream

quiet_upstream()

from megatron_rl.prove import rank  # noqa: E402 (after the filters)

__all__ = ["rank"]
