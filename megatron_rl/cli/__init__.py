"""The command line: ``megatron-rl VERB``."""

from megatron_rl.cli.command import main

__all__ = ["main"]
