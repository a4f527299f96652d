"""Puts whole prompts through the model: to begin decoding, or to score them.

Legend: B rows, T positions, V vocabulary, N output tokens, S stop tokens, A layers of the
model, E experts that a token takes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_rl.inference_server.decode import Columns, DecodeBatch, stops_of
from megatron_rl.inference_server.kvcache import RowCache
from megatron_rl.inference_server.masks import masks
from megatron_rl.inference_server.requests import Row
from megatron_rl.inference_server.routes import RouteRecorder, listening

PREFILL_TOKENS = 16384
"""Prompt tokens, padding included, in one forward pass."""
SCORE_LOGITS = 1 << 27
"""Logits in one forward pass that scores: half a gigabyte in float32."""


def prefill(
    model: PreTrainedModel,
    rows: list[Row],
    seeds: Sequence[int],
    eos: Sequence[int],
    recorder: RouteRecorder | None = None,
) -> tuple[DecodeBatch, list[Row]]:
    """Return a batch of these rows, each with its next token drawn, and the rows that this already finished.

    Rows with the same tokens are put through the model once.
    """
    unique: dict[tuple[int, ...], int] = {}
    places = [unique.setdefault((*row.prompt, *row.output_ids), len(unique)) for row in rows]
    places_B = torch.tensor(places, device=model.device)
    prefixes = list(unique)
    recorder = recorder if any(row.returns_routes for row in rows) else None
    parts = [_begin(model, part, recorder) for part in _slices(prefixes, PREFILL_TOKENS)]
    cache = parts[0][0] if len(parts) == 1 else RowCache.stack([cache for cache, _, _ in parts])
    routes = [routes_TAE for _, _, part in parts for routes_TAE in part]
    for row, place in zip(rows, places, strict=True):
        row.prefix_routes = routes[place].cpu() if row.returns_routes and routes else None
    if len(prefixes) < len(rows):
        cache.select(places_B, 0)
    logits_BV = torch.cat([logits_BV for _, logits_BV, _ in parts])[places_B]
    columns = _columns(rows, eos, recorder).map(lambda column: column.to(model.device))
    batch = DecodeBatch(model, rows, columns, cache, seeds, recorder)
    return batch, batch.take(logits_BV)


def score(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return the log-probability of each token but the first, given the tokens before it, at temperature 1."""
    scores: list[list[float]] = []
    tokens = min(PREFILL_TOKENS, SCORE_LOGITS // model.config.get_text_config().vocab_size)
    for part in _slices(sequences, tokens):
        ids_BT, inputs = padded_inputs(model, part)
        logits_BTV = model(input_ids=ids_BT, use_cache=False, **inputs).logits[:, :-1]
        exact = logits_BTV.dtype if logits_BTV.dtype == torch.float64 else torch.float32
        logprobs_BT = logits_BTV.to(exact).log_softmax(-1).gather(2, ids_BT[:, 1:, None])[:, :, 0]
        rows = zip(logprobs_BT, part, strict=True)
        scores += [logprobs_T[len(logprobs_T) + 1 - len(ids) :].tolist() for logprobs_T, ids in rows]
    return scores


def padded_inputs(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]]
) -> tuple[Tensor, dict[str, Tensor | dict[str, Tensor]]]:
    """Return token ids [B, T] aligned at their ends, and the positions and the mask for the model."""
    width, device = max(map(len, sequences)), model.device
    pads = [width - len(ids) for ids in sequences]
    ids_BT = torch.tensor([[0] * pad + list(ids) for pad, ids in zip(pads, sequences, strict=True)], device=device)
    places_T = torch.arange(width, device=device)
    if not any(pads):
        return ids_BT, {"position_ids": places_T.expand(len(sequences), -1)}
    pads_B = torch.tensor(pads, device=device)
    positions_BT = (places_T - pads_B[:, None]).clamp(min=0)
    used_BT = places_T >= pads_B[:, None]
    causal_TT = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    seen_B1TT = (used_BT[:, None] & causal_TT)[:, None]
    return ids_BT, {"position_ids": positions_BT, "attention_mask": masks(model, seen_B1TT)}


def _begin(
    model: PreTrainedModel, prefixes: Sequence[Sequence[int]], recorder: RouteRecorder | None
) -> tuple[RowCache, Tensor, list[Tensor]]:
    """Return the cache of these token sequences, the logits [B, V] after each, the routes [T, A, E] of each."""
    cache = RowCache(model.config.get_text_config().num_hidden_layers)
    ids_BT, inputs = padded_inputs(model, prefixes)
    with listening(recorder) as heard:
        logits_BTV = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs).logits
    routes_BTAE = recorder.stacked(heard, len(prefixes)) if recorder and heard else ()
    routes = [row_TAE[len(row_TAE) - len(ids) :] for row_TAE, ids in zip(routes_BTAE, prefixes, strict=False)]
    return cache, logits_BTV[:, -1], routes


def _slices(sequences: Sequence[Sequence[int]], tokens: int) -> list[Sequence[Sequence[int]]]:
    at_once = max(1, tokens // max(map(len, sequences), default=1))
    return [sequences[i : i + at_once] for i in range(0, len(sequences), at_once)]


def _columns(rows: list[Row], eos: Sequence[int], recorder: RouteRecorder | None) -> Columns:
    stops = [stops_of(row, eos) for row in rows]
    num_stops = max(1, *map(len, stops))
    width = max(row.limit for row in rows)
    columns = Columns(
        last_B=torch.zeros(len(rows), dtype=torch.int64),
        lengths_B=torch.tensor([len(row.prompt) + len(row.output_ids) for row in rows]),
        counts_B=torch.tensor([len(row.output_ids) for row in rows]),
        limits_B=torch.tensor([row.limit for row in rows]),
        alive_B=torch.ones(len(rows), dtype=torch.bool),
        stops_BS=torch.tensor([ids + [-1] * (num_stops - len(ids)) for ids in stops]),
        outputs_BN=torch.zeros(len(rows), width, dtype=torch.int64),
        logprobs_BN=torch.zeros(len(rows), width, dtype=torch.float64),
        routes_BX=torch.zeros(len(rows), width * recorder.size if recorder else 0, dtype=torch.int16),
    )
    for i, row in enumerate(rows):  # rows that were sent back bring the tokens they already have
        columns.outputs_BN[i, : len(row.output_ids)] = torch.tensor(row.output_ids, dtype=torch.int64)
        columns.logprobs_BN[i, : len(row.logprobs)] = torch.tensor(row.logprobs, dtype=torch.float64)
    return columns
