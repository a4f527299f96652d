"""Processes whole prompts: to start decoding, or to score them.

Legend: B sequences, T positions (or output tokens), V vocabulary, L layers, K experts per token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_rl.inference_server.decode import DecodeBatch, DecodeState, stop_ids_of
from megatron_rl.inference_server.kv_cache import DecodeCache
from megatron_rl.inference_server.masks import attention_masks
from megatron_rl.inference_server.requests import ActiveSequence
from megatron_rl.inference_server.route_recorder import RouteRecorder, recording

PREFILL_TOKENS = 16384
"""Maximum number of prompt tokens, padding included, per forward pass."""
SCORE_LOGITS = 1 << 27
"""Maximum number of logits per forward pass that scores: half a gigabyte in float32."""


def prefill(
    model: PreTrainedModel,
    sequences: list[ActiveSequence],
    seeds: Sequence[int],
    eos_ids: Sequence[int],
    recorder: RouteRecorder | None = None,
) -> tuple[DecodeBatch, list[ActiveSequence]]:
    """Return a batch of these sequences after their next token, and the sequences that this token finished.

    Sequences with equal tokens are processed once.
    """
    unique: dict[tuple[int, ...], int] = {}
    prefix_indices = [unique.setdefault((*s.prompt, *s.output_ids), len(unique)) for s in sequences]
    prefix_indices_B = torch.tensor(prefix_indices, device=model.device)
    prefixes = list(unique)
    recorder = recorder if any(sequence.return_routes for sequence in sequences) else None
    parts = [_prefill(model, part, recorder) for part in _parts(prefixes, PREFILL_TOKENS)]
    cache = parts[0][0] if len(parts) == 1 else DecodeCache.stack([cache for cache, _, _ in parts])
    routes = [routes_TLK for _, _, part in parts for routes_TLK in part]
    for sequence, index in zip(sequences, prefix_indices, strict=True):
        sequence.prefix_routes = routes[index].cpu() if sequence.return_routes and routes else None
    if len(prefixes) < len(sequences):
        cache.select(prefix_indices_B, 0)
    logits_BV = torch.cat([logits_BV for _, logits_BV, _ in parts])[prefix_indices_B]
    state = _initial_state(sequences, eos_ids, recorder).map(lambda column: column.to(model.device))
    batch = DecodeBatch(model, sequences, state, cache, seeds, recorder)
    return batch, batch.take(logits_BV)


def score(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return the log-probability, in nats, of each token but the first given the previous ones, at temperature 1."""
    scores: list[list[float]] = []
    max_tokens = min(PREFILL_TOKENS, SCORE_LOGITS // model.config.get_text_config().vocab_size)
    for part in _parts(sequences, max_tokens):
        ids_BT, inputs = padded_inputs(model, part)
        logits_BTV = model(input_ids=ids_BT, use_cache=False, **inputs).logits[:, :-1]
        dtype = logits_BTV.dtype if logits_BTV.dtype == torch.float64 else torch.float32
        logprobs_BT = logits_BTV.to(dtype).log_softmax(-1).gather(2, ids_BT[:, 1:, None])[:, :, 0]
        scores += [
            logprobs_T[len(logprobs_T) + 1 - len(ids) :].tolist()
            for logprobs_T, ids in zip(logprobs_BT, part, strict=True)
        ]
    return scores


def padded_inputs(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]]
) -> tuple[Tensor, dict[str, Tensor | dict[str, Tensor]]]:
    """Return left-padded token ids [B, T], and the positions and masks for the model."""
    width, device = max(map(len, sequences)), model.device
    pads = [width - len(ids) for ids in sequences]
    ids_BT = torch.tensor([[0] * pad + list(ids) for pad, ids in zip(pads, sequences, strict=True)], device=device)
    columns_T = torch.arange(width, device=device)
    if not any(pads):
        return ids_BT, {"position_ids": columns_T.expand(len(sequences), -1)}
    pads_B = torch.tensor(pads, device=device)
    positions_BT = (columns_T - pads_B[:, None]).clamp(min=0)
    used_BT = columns_T >= pads_B[:, None]
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    visible = (used_BT[:, None] & causal)[:, None]  # [B, 1, T, T]
    return ids_BT, {"position_ids": positions_BT, "attention_mask": attention_masks(model, visible)}


def _prefill(
    model: PreTrainedModel, prefixes: Sequence[Sequence[int]], recorder: RouteRecorder | None
) -> tuple[DecodeCache, Tensor, list[Tensor]]:
    """Return the cache of these token sequences, the logits [B, V] after each, the routes [T, L, K] of each."""
    cache = DecodeCache(model.config.get_text_config().num_hidden_layers)
    ids_BT, inputs = padded_inputs(model, prefixes)
    with recording(recorder) as recorded:
        logits_BTV = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs).logits
    routes_BTLK = recorder.stack(recorded, len(prefixes)) if recorder and recorded else ()
    routes = [routes_TLK[len(routes_TLK) - len(ids) :] for routes_TLK, ids in zip(routes_BTLK, prefixes, strict=False)]
    return cache, logits_BTV[:, -1], routes


def _parts(sequences: Sequence[Sequence[int]], max_tokens: int) -> list[Sequence[Sequence[int]]]:
    size = max(1, max_tokens // max(map(len, sequences), default=1))
    return [sequences[i : i + size] for i in range(0, len(sequences), size)]


def _initial_state(
    sequences: list[ActiveSequence], eos_ids: Sequence[int], recorder: RouteRecorder | None
) -> DecodeState:
    stop_ids = [stop_ids_of(sequence, eos_ids) for sequence in sequences]
    num_stops = max(1, *map(len, stop_ids))
    size, limit = len(sequences), max(sequence.limit for sequence in sequences)
    state = DecodeState(
        last_ids_B=torch.zeros(size, dtype=torch.int64),
        lengths_B=torch.tensor([len(s.prompt) + len(s.output_ids) for s in sequences]),
        counts_B=torch.tensor([len(s.output_ids) for s in sequences]),
        limits_B=torch.tensor([s.limit for s in sequences]),
        active_B=torch.ones(size, dtype=torch.bool),
        stop_ids=torch.tensor([ids + [-1] * (num_stops - len(ids)) for ids in stop_ids]),
        output_ids_BT=torch.zeros(size, limit, dtype=torch.int64),
        logprobs_BT=torch.zeros(size, limit, dtype=torch.float64),
        routes=torch.zeros(size, limit * recorder.size if recorder else 0, dtype=torch.int16),
    )
    for i, sequence in enumerate(sequences):  # retracted sequences have tokens already
        state.output_ids_BT[i, : len(sequence.output_ids)] = torch.tensor(sequence.output_ids, dtype=torch.int64)
        state.logprobs_BT[i, : len(sequence.logprobs)] = torch.tensor(sequence.logprobs, dtype=torch.float64)
    return state
