"""Reinforcement learning for large mixture-of-experts language models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rl.api import PolicyLoss, policy_loss, vocab_logprobs_entropies

__all__ = ["PolicyLoss", "policy_loss", "vocab_logprobs_entropies"]


def __getattr__(name: str) -> object:
    # On first use: a command that only reads a configuration should not wait for torch.
    if name in __all__:
        from megatron_rl import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
