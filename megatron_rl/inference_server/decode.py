"""Decodes sequences together on a Hugging Face model: one forward pass per token for all of them.

Between two steps a batch is plain data: sequences can be removed, retracted, or joined by those of another batch. The
newest token of a sequence has not been through the model yet, so the next token comes from the weights of that moment.

Legend: B sequences, T output tokens, V vocabulary, L layers, K experts per token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_rl.inference_server.kv_cache import DecodeCache
from megatron_rl.inference_server.masks import attention_masks
from megatron_rl.inference_server.requests import ActiveSequence
from megatron_rl.inference_server.route_recorder import RouteRecorder, recording
from megatron_rl.inference_server.sampler import SamplingTensors, masked_probs, sample

_COMPACT_BELOW = 0.75
"""Fraction of active sequences below which finished ones are removed; removing them copies the whole cache."""


@dataclass
class DecodeState:
    """The state of each sequence, as tensors."""

    last_ids_B: Tensor
    """The newest token, which is not in the cache yet."""
    lengths_B: Tensor
    """Tokens in the cache, which is also the position of the newest token."""
    counts_B: Tensor
    """Number of output tokens."""
    limits_B: Tensor
    """Maximum number of output tokens."""
    active_B: Tensor
    stop_ids: Tensor
    """[B, stop tokens], padded with -1."""
    output_ids_BT: Tensor
    logprobs_BT: Tensor
    routes: Tensor
    """int16 [B, T * L * K]; empty while no sequence returns routes."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "DecodeState":
        """Return the state with the function applied to each tensor."""
        return DecodeState(**{f.name: function(getattr(self, f.name)) for f in dataclasses.fields(self)})

    @staticmethod
    def join(states: "Sequence[DecodeState]") -> "DecodeState":
        """Return the states of all sequences as one."""
        names = [f.name for f in dataclasses.fields(DecodeState)]
        return DecodeState(**{name: _cat([getattr(state, name) for state in states]) for name in names})


class DecodeBatch:
    """Sequences that are being decoded, with a key-value cache that grows."""

    active: dict[int, ActiveSequence]
    """Unfinished sequences by their index in the batch."""
    has_stop_strings: bool
    """Whether the text of some sequence must be checked after each token."""

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: list[ActiveSequence],
        state: DecodeState,
        cache: DecodeCache,
        seeds: Sequence[int],
        recorder: RouteRecorder | None = None,
    ) -> None:
        self.model = model
        self.sequences = sequences
        self.seeds = list(seeds)
        self.state = state
        self.cache = cache
        self.recorder = recorder
        self._refresh()

    def __len__(self) -> int:
        return len(self.active)

    def _refresh(self) -> None:
        self.active = {i: self.sequences[i] for i in self.state.active_B.nonzero()[:, 0].tolist()}
        self.is_padded = bool((self.state.lengths_B < self.cache.width).any())
        vocabulary = self.model.config.get_text_config().vocab_size
        sampling = SamplingTensors.of([sequence.params for sequence in self.sequences], self.seeds, vocabulary)
        self.sampling = sampling.to(self.state.last_ids_B.device)
        self.has_stop_strings = any(sequence.params.stop_strings for sequence in self.sequences)
        self.indices_B = torch.arange(len(self.sequences), device=self.state.last_ids_B.device)

    def step(self) -> list[ActiveSequence]:
        """Generate one token for every active sequence; return the sequences that it finished."""
        state, mask = self.state, None
        if self.is_padded:
            width = self.cache.width + 1
            mask = torch.arange(width, device=state.last_ids_B.device) >= (width - 1 - state.lengths_B)[:, None]
            mask = attention_masks(self.model, mask[:, None, None, :])
        with recording(self.recorder) as recorded:
            logits_BV = self.model(
                input_ids=state.last_ids_B[:, None],
                position_ids=state.lengths_B[:, None],
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
            ).logits[:, -1]
        if self.recorder and recorded:
            self._store_routes(self.recorder.stack(recorded, len(self.sequences)))
        state.lengths_B = state.lengths_B + 1
        return self.take(logits_BV)

    def _store_routes(self, routes_BTLK: Tensor) -> None:
        """Store the routes of the newest tokens, which are output tokens ``counts - 1``."""
        state, size = self.state, routes_BTLK[0].numel()
        by_token = state.routes.view(len(self.sequences), -1, size)
        positions_B = (state.counts_B - 1).clamp(max=by_token.shape[1] - 1)  # as in take
        by_token[self.indices_B, positions_B] = routes_BTLK.reshape(-1, size)

    def take(self, logits_BV: Tensor) -> list[ActiveSequence]:
        """Sample a token for every sequence from these logits; return the sequences that it finished."""
        state = self.state
        ids_B, logprobs_B = sample(logits_BV, self.sampling, state.counts_B)
        # Finished sequences stay in the batch until it is compacted; their positions are kept in bounds.
        positions_B = state.counts_B.clamp(max=state.output_ids_BT.shape[1] - 1)
        state.output_ids_BT[self.indices_B, positions_B] = ids_B
        state.logprobs_BT[self.indices_B, positions_B] = logprobs_B.double()
        self._note_masks(logits_BV, ids_B)
        state.last_ids_B, state.counts_B = ids_B, state.counts_B + 1
        at_limit_B = state.counts_B >= state.limits_B
        at_stop_B = (ids_B[:, None] == state.stop_ids).any(1)
        ended_B = (at_limit_B | at_stop_B) & state.active_B
        if not ended_B.any():
            return []
        ended = ended_B.nonzero()[:, 0].tolist()
        for i, at_limit in zip(ended, at_limit_B[ended].tolist(), strict=True):
            # SGLang checks the length first: a stop token at the limit counts as "length".
            sequence = self.sequences[i]
            self._write_back([i])
            sequence.finish_reason = (
                {"type": "length", "length": len(sequence.output_ids)}
                if at_limit
                else {"type": "stop", "matched": sequence.output_ids[-1]}
            )
        return self._remove(ended)

    def _note_masks(self, logits_BV: Tensor, ids_B: Tensor) -> None:
        """Append the ids that the newest token was sampled from, for the sequences that return them."""
        noted = {i: sequence for i, sequence in self.active.items() if sequence.return_sampling_mask}
        if not noted:
            return
        probs_BV = masked_probs(logits_BV, self.sampling)
        logprobs_B = probs_BV.gather(1, ids_B[:, None])[:, 0].log()
        for i, sequence in noted.items():
            sequence.mask_ids.append(probs_BV[i].nonzero()[:, 0].tolist())
            sequence.mask_logprobs.append(float(logprobs_B[i]))

    def _write_back(self, indices: Sequence[int]) -> None:
        """Copy the tokens decoded so far to these sequences."""
        for i in indices:
            sequence, count = self.sequences[i], int(self.state.counts_B[i])
            sequence.output_ids = self.state.output_ids_BT[i, :count].tolist()
            sequence.logprobs = self.state.logprobs_BT[i, :count].tolist()
            prefix = sequence.prefix_routes
            if prefix is not None:
                start = len(prefix) - len(sequence.prompt)
                newer = self.state.routes[i].view(-1, *prefix.shape[1:])[start : count - 1]
                sequence.routes = torch.cat([prefix, newer.cpu()])

    def withdraw(self, sequences: Sequence[ActiveSequence]) -> list[ActiveSequence]:
        """Remove the active ones of these sequences, with the tokens they have so far; return them."""
        ids = set(map(id, sequences))
        indices = [i for i, sequence in self.active.items() if id(sequence) in ids]
        self._write_back(indices)
        return self._remove(indices)

    def peek(self, sequence: ActiveSequence) -> tuple[list[int], list[float]]:
        """Return the output tokens and log-probs that an active sequence has so far."""
        self._write_back([next(i for i, other in self.active.items() if other is sequence)])
        return sequence.output_ids, sequence.logprobs

    def note_version(self, version: str) -> None:
        """Record that the next tokens are generated with this version of the weights."""
        for sequence, count in zip(self.active.values(), self.counts(), strict=True):
            sequence.note_version(version, count)

    def counts(self) -> list[int]:
        """Return the number of output tokens of each active sequence."""
        return self.state.counts_B[list(self.active)].tolist()

    def _remove(self, indices: Sequence[int]) -> list[ActiveSequence]:
        removed = [self.active.pop(i) for i in indices]
        self.state.active_B[list(indices)] = False
        if len(self.active) < _COMPACT_BELOW * len(self.sequences):
            self.compact()
        return removed

    def compact(self) -> None:
        """Remove finished sequences, and cache positions that no sequence uses."""
        if not self.active:
            return
        indices = list(self.active)
        indices_B = torch.tensor(indices, device=self.state.last_ids_B.device)
        self.sequences = [self.sequences[i] for i in indices]
        self.seeds = [self.seeds[i] for i in indices]
        self.state = self.state.map(lambda column: column[indices_B])
        self.cache.select(indices_B, self.cache.width - int(self.state.lengths_B.max()))
        self._refresh()

    def join(self, other: "DecodeBatch") -> "DecodeBatch":
        """Return one batch with the active sequences of both."""
        self.compact()
        other.compact()
        state = DecodeState.join([self.state, other.state])
        cache = DecodeCache.stack([self.cache, other.cache])
        sequences, seeds = self.sequences + other.sequences, self.seeds + other.seeds
        return DecodeBatch(self.model, sequences, state, cache, seeds, self.recorder or other.recorder)


def _cat(columns: Sequence[Tensor]) -> Tensor:
    if columns[0].dim() == 1:
        return torch.cat(list(columns))
    width = max(column.shape[1] for column in columns)
    # -1 is not a token: it pads stop tokens, and outputs are not read before they are written.
    return torch.cat([torch.nn.functional.pad(c, (0, width - c.shape[1]), value=-1) for c in columns])


def stop_ids_of(sequence: ActiveSequence, eos_ids: Sequence[int]) -> list[int]:
    """Return the tokens that finish a sequence."""
    return [] if sequence.params.ignore_eos else [*eos_ids, *(sequence.params.stop_token_ids or ())]
