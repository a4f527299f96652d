"""Reinforcement learning for large mixture-of-experts language models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rl.api import PolicyLoss, Totals, next_state, policy_loss, vocab_logprobs_entropies

    __version__: str

__all__ = ["PolicyLoss", "Totals", "__version__", "next_state", "policy_loss", "vocab_logprobs_entropies"]


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that commands that only read a configuration do not wait for torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("megatron-rl")
    if name in __all__:
        from megatron_rl import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
