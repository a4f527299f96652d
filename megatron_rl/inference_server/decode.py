"""Decodes rows together on a Hugging Face model: one forward pass a token for all of them.

Between two steps a batch is plain data: rows can be dropped, sent back or joined by the rows of another batch. The last
sampled token of a row has not been through the model yet, so weights that change between steps make the next token.

Legend: B rows, V vocabulary, S stop tokens, N output tokens, X routes of N output tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_rl.inference_server.kvcache import RowCache
from megatron_rl.inference_server.masks import masks
from megatron_rl.inference_server.requests import Row
from megatron_rl.inference_server.routes import RouteRecorder, listening
from megatron_rl.inference_server.sampler import SamplingColumns, sample

_COMPACT_BELOW = 0.75  # share of live rows under which the finished ones are dropped: dropping copies the whole cache


@dataclass
class Columns:
    """What is known of each row, as tensors."""

    last_B: Tensor
    """The newest token, not yet in the cache."""
    lengths_B: Tensor
    """Tokens in the cache: also the position of the newest token."""
    counts_B: Tensor
    """Output tokens so far."""
    limits_B: Tensor
    alive_B: Tensor
    stops_BS: Tensor
    outputs_BN: Tensor
    logprobs_BN: Tensor
    routes_BX: Tensor
    """Empty while no row wants routes; one that joins later has them from then on."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Columns":
        """Return the columns with the function applied to each."""
        return Columns(**{f.name: function(getattr(self, f.name)) for f in dataclasses.fields(self)})


class DecodeBatch:
    """Rows in the middle of their decoding."""

    live: dict[int, Row]
    """Those that have not ended, by their place."""
    stop_strings: bool
    """Some row's text must be looked at after every token."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: list[Row],
        columns: Columns,
        cache: RowCache,
        seeds: Sequence[int],
        recorder: RouteRecorder | None = None,
    ) -> None:
        self.model = model
        self.rows = rows
        self.seeds = list(seeds)
        self.columns = columns
        self.cache = cache
        self.recorder = recorder
        self._refresh()

    def __len__(self) -> int:
        return len(self.live)

    def _refresh(self) -> None:
        self.live = {i: self.rows[i] for i in self.columns.alive_B.nonzero()[:, 0].tolist()}
        self.padded = bool((self.columns.lengths_B < self.cache.width).any())
        vocabulary = self.model.config.get_text_config().vocab_size
        sampling = SamplingColumns.of([row.params for row in self.rows], self.seeds, vocabulary)
        self.sampling = sampling.to(self.columns.last_B.device)
        self.stop_strings = any(row.params.stop_strings for row in self.rows)
        self.ids_B = torch.arange(len(self.rows), device=self.columns.last_B.device)

    def step(self) -> list[Row]:
        """Give every live row one more token; return the rows that this finished."""
        columns, mask = self.columns, None
        if self.padded:
            width = self.cache.width + 1
            mask = torch.arange(width, device=columns.last_B.device) >= (width - 1 - columns.lengths_B)[:, None]
            mask = masks(self.model, mask[:, None, None, :])
        with listening(self.recorder) as heard:
            logits_BV = self.model(
                input_ids=columns.last_B[:, None],
                position_ids=columns.lengths_B[:, None],
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
            ).logits[:, -1]
        if self.recorder and heard:
            self._keep_routes(self.recorder.stacked(heard, len(self.rows)))
        columns.lengths_B = columns.lengths_B + 1
        return self.take(logits_BV)

    def _keep_routes(self, routes_B1AE: Tensor) -> None:
        """Keep where the newest tokens went: they are output tokens ``counts - 1``."""
        c, size = self.columns, routes_B1AE[0].numel()
        by_token_BNX = c.routes_BX.view(len(self.rows), -1, size)
        slots_B = (c.counts_B - 1).clamp(max=by_token_BNX.shape[1] - 1)  # as in take
        by_token_BNX[self.ids_B, slots_B] = routes_B1AE.reshape(-1, size)

    def take(self, logits_BV: Tensor) -> list[Row]:
        """Draw a token for every row from these logits; return the rows that this finished."""
        c = self.columns
        tokens_B, logprobs_B = sample(logits_BV, self.sampling, c.counts_B)
        slots_B = c.counts_B.clamp(max=c.outputs_BN.shape[1] - 1)  # finished rows that still ride along stay in bounds
        c.outputs_BN[self.ids_B, slots_B] = tokens_B
        c.logprobs_BN[self.ids_B, slots_B] = logprobs_B.double()
        c.last_B, c.counts_B = tokens_B, c.counts_B + 1
        at_limit_B = c.counts_B >= c.limits_B
        at_stop_B = (tokens_B[:, None] == c.stops_BS).any(1)
        ended_B = (at_limit_B | at_stop_B) & c.alive_B
        if not ended_B.any():
            return []
        ended = ended_B.nonzero()[:, 0].tolist()
        for i, at_limit in zip(ended, at_limit_B[ended].tolist(), strict=True):
            # SGLang looks at the length first: a stop token in the last place counts as "length".
            row = self.rows[i]
            self._write_back([i])
            row.finish = (
                {"type": "length", "length": len(row.output_ids)}
                if at_limit
                else {"type": "stop", "matched": row.output_ids[-1]}
            )
        return self._remove(ended)

    def _write_back(self, ids: Sequence[int]) -> None:
        for i in ids:
            row, count = self.rows[i], int(self.columns.counts_B[i])
            row.output_ids = self.columns.outputs_BN[i, :count].tolist()
            row.logprobs = self.columns.logprobs_BN[i, :count].tolist()
            if row.prefix_routes is not None:
                known, each = len(row.prefix_routes) - len(row.prompt), row.prefix_routes.shape[1:]
                newer = self.columns.routes_BX[i].view(-1, *each)[known : count - 1]
                row.routes = torch.cat([row.prefix_routes, newer.cpu()])

    def withdraw(self, rows: Sequence[Row]) -> list[Row]:
        """Take live rows out, with the tokens they have so far; return them."""
        wanted = set(map(id, rows))
        ids = [i for i, row in self.live.items() if id(row) in wanted]
        self._write_back(ids)
        return self._remove(ids)

    def peek(self, row: Row) -> tuple[list[int], list[float]]:
        """Return the output tokens and log-probs that a live row has so far."""
        self._write_back([next(i for i, other in self.live.items() if other is row)])
        return row.output_ids, row.logprobs

    def note_version(self, version: str) -> None:
        """Record that the next tokens come from other weights."""
        for row, count in zip(self.live.values(), self.counts(), strict=True):
            row.note_version(version, count)

    def counts(self) -> list[int]:
        """Return how many output tokens each live row has."""
        return self.columns.counts_B[list(self.live)].tolist()

    def _remove(self, ids: Sequence[int]) -> list[Row]:
        removed = [self.live.pop(i) for i in ids]
        self.columns.alive_B[list(ids)] = False
        if len(self.live) < _COMPACT_BELOW * len(self.rows):
            self.compact()
        return removed

    def compact(self) -> None:
        """Drop the finished rows, and the cache positions that no row uses."""
        if not self.live:
            return
        keep = list(self.live)
        kept_B = torch.tensor(keep, device=self.columns.last_B.device)
        self.rows = [self.rows[i] for i in keep]
        self.seeds = [self.seeds[i] for i in keep]
        self.columns = self.columns.map(lambda column: column[kept_B])
        self.cache.select(kept_B, self.cache.width - int(self.columns.lengths_B.max()))
        self._refresh()

    def join(self, other: "DecodeBatch") -> "DecodeBatch":
        """Return one batch with the live rows of both."""
        self.compact()
        other.compact()
        parts = [self.columns, other.columns]
        columns = Columns(**{f.name: _cat([getattr(c, f.name) for c in parts]) for f in dataclasses.fields(Columns)})
        cache = RowCache.stack([self.cache, other.cache])
        rows, seeds = self.rows + other.rows, self.seeds + other.seeds
        return DecodeBatch(self.model, rows, columns, cache, seeds, self.recorder or other.recorder)


def _cat(columns: Sequence[Tensor]) -> Tensor:
    if columns[0].dim() == 1:
        return torch.cat(list(columns))
    width = max(column.shape[1] for column in columns)
    # -1 is no token: stop lists are filled up with it, and output slots are not read before they are written.
    return torch.cat([torch.nn.functional.pad(c, (0, width - c.shape[1]), value=-1) for c in columns])


def stops_of(row: Row, eos: Sequence[int]) -> list[int]:
    """Return the tokens that end a row."""
    return [] if row.params.ignore_eos else [*eos, *(row.params.stop_token_ids or ())]
