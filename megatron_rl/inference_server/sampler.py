"""Samples one token per sequence from one uniform number per sequence.

The uniform number is a hash of the sequence's seed and the token's position, so a sequence's tokens depend on its seed
and its logits only: not on the other sequences of the batch, on pauses, or on the server.

Legend: B sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_rl.inference_server.requests import SamplingParams

_STEP, _MIX_A, _MIX_B = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64, as signed 64-bit


@dataclass(frozen=True)
class SamplingTensors:
    """The sampling parameters of a batch as tensors."""

    temperatures_B: Tensor
    top_ks_B: Tensor
    top_ps_B: Tensor
    min_ps_B: Tensor
    seeds_B: Tensor
    greedy_B: Tensor
    truncates: bool
    """Whether some sequence has top-k, top-p or min-p."""
    all_greedy: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], seeds: Sequence[int], vocabulary: int) -> "SamplingTensors":
        """Return the tensors for these parameters; temperature 0 is greedy, with log-probs at temperature 1."""
        greedy = [p.temperature == 0 or p.top_k == 1 for p in params]
        return cls(
            torch.tensor([p.temperature or 1.0 for p in params], dtype=torch.float64),
            torch.tensor([p.top_k if p.top_k > 0 else vocabulary for p in params]),
            torch.tensor([p.top_p for p in params], dtype=torch.float64),
            torch.tensor([p.min_p for p in params], dtype=torch.float64),
            torch.tensor(seeds, dtype=torch.int64),
            torch.tensor(greedy),
            any(p.truncates and not g for p, g in zip(params, greedy, strict=True)),
            all(greedy),
        )

    def to(self, device: torch.device) -> "SamplingTensors":
        """Return the tensors on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in moved.items() if isinstance(value, Tensor)})


def uniforms(seeds_B: Tensor, positions_B: Tensor) -> Tensor:
    """Return float64 [B] in [0, 1): 52 bits of a splitmix64 hash of (seed, position)."""
    state_B = seeds_B ^ ((positions_B + 1) * _STEP)
    for _ in range(2):
        state_B = (state_B ^ _shift(state_B, 30)) * _MIX_A
        state_B = (state_B ^ _shift(state_B, 27)) * _MIX_B
        state_B = state_B ^ _shift(state_B, 31)
    return _shift(state_B, 12).double() * 2.0**-52


def _shift(x_B: Tensor, bits: int) -> Tensor:
    return (x_B >> bits) & ((1 << (64 - bits)) - 1)


def sample(logits_BV: Tensor, params: SamplingTensors, positions_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return sampled tokens [B] and their log-probabilities [B] in nats.

    As in SGLang, log-probabilities are those after temperature and before top-k, top-p and min-p.
    """
    logprobs_BV = _logprobs(logits_BV, params)
    ids_B = logprobs_BV.argmax(-1)
    if not params.all_greedy:
        probs_BV = logprobs_BV.double().exp()
        if params.truncates:
            probs_BV = truncate(probs_BV, params)
        # The first token whose cumulative weight exceeds the target, which is never a token of weight 0.
        cumulative_BV = probs_BV.cumsum(-1)
        target_B = uniforms(params.seeds_B, positions_B) * cumulative_BV[:, -1]
        sampled_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
        ids_B = torch.where(params.greedy_B, ids_B, sampled_B.clamp_(max=logits_BV.shape[1] - 1))
    return ids_B, logprobs_BV.gather(1, ids_B[:, None])[:, 0]


def _logprobs(logits_BV: Tensor, params: SamplingTensors) -> Tensor:
    dtype = logits_BV.dtype if logits_BV.dtype == torch.float64 else torch.float32
    return (logits_BV.to(dtype) / params.temperatures_B[:, None].to(dtype)).log_softmax(-1)


def masked_probs(logits_BV: Tensor, params: SamplingTensors) -> Tensor:
    """Return the probabilities, float64 [B, V], that tokens are sampled with: 0 where excluded, and a sum of 1."""
    probs_BV = _logprobs(logits_BV, params).double().exp()
    greedy_BV = torch.zeros_like(probs_BV).scatter_(1, probs_BV.argmax(-1, keepdim=True), 1.0)
    rest_BV = truncate(probs_BV, params)
    return torch.where(params.greedy_B[:, None], greedy_BV, rest_BV / rest_BV.sum(-1, keepdim=True))


def truncate(probs_BV: Tensor, params: SamplingTensors) -> Tensor:
    """Return the probabilities with those excluded by top-k, top-p or min-p of the full distribution set to 0."""
    sorted_BV, ids_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    ranks_V = torch.arange(probs_BV.shape[1], device=probs_BV.device)
    keep_BV = ranks_V < params.top_ks_B[:, None]
    keep_BV &= before_BV <= params.top_ps_B[:, None]
    keep_BV &= sorted_BV >= sorted_BV[:, :1] * params.min_ps_B[:, None]
    return torch.zeros_like(probs_BV).scatter_(1, ids_BV, sorted_BV * keep_BV)
