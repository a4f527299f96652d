"""One decoding step on fixed addresses: fit for a CUDA graph, and the same code without one.

A step has a fixed number of slots and a fixed width of the key-value cache. A row keeps its slot, and its token at
position p lies at place p of the slot. What is beyond a row's length is masked, and zero or another finite number.
Slots without a row, and rows that have ended, go through the model like the others and change nothing: ``alive`` says
so on the device.

Legend: B slots, W positions, S stop tokens, V vocabulary, X numbers of a token's routes, N key-value heads, H size of
a head.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from megatron_rl.inference_server.experts import experts_by
from megatron_rl.inference_server.masks import masks
from megatron_rl.inference_server.requests import Row
from megatron_rl.inference_server.routes import RouteRecorder, listening
from megatron_rl.inference_server.sampler import SamplingColumns, sample


@dataclass(frozen=True)
class Kind:
    """What a step is made for: two batches of one kind run the same step."""

    slots: int
    width: int
    stops: int
    truncated: bool
    all_greedy: bool
    routed: bool


def size_class(count: int, least: int = 1) -> int:
    """Return the smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... that is at least both numbers."""
    power = 1 << max(count, least, 1).bit_length() - 1
    return next(size for size in (power, power * 3 // 2, power * 2) if size >= max(count, least))


@dataclass
class SlotColumns:
    """What is known of each slot; written in place."""

    last_B: Tensor
    """The newest token, not yet in the cache."""
    positions_B: Tensor
    """Its position."""
    counts_B: Tensor
    """Output tokens so far."""
    limits_B: Tensor
    alive_B: Tensor
    stops_BS: Tensor
    tokens_BW: Tensor
    """At p: the token that was drawn after position p."""
    logprobs_BW: Tensor
    routes_BWX: Tensor
    sampling: SamplingColumns

    @classmethod
    def empty(cls, kind: Kind, device: torch.device, route_size: int) -> "SlotColumns":
        """Return columns without a row."""
        whole = {"dtype": torch.int64, "device": device}
        exact = {"dtype": torch.float64, "device": device}
        b, w = kind.slots, kind.width
        return cls(
            last_B=torch.zeros(b, **whole),
            positions_B=torch.zeros(b, **whole),
            counts_B=torch.zeros(b, **whole),
            limits_B=torch.zeros(b, **whole),
            alive_B=torch.zeros(b, dtype=torch.bool, device=device),
            stops_BS=torch.full((b, kind.stops), -1, **whole),
            tokens_BW=torch.zeros(b, w, **whole),
            logprobs_BW=torch.zeros(b, w, **exact),
            routes_BWX=torch.zeros(b, w, route_size if kind.routed else 0, dtype=torch.int16, device=device),
            sampling=SamplingColumns(
                temperatures_B=torch.ones(b, **exact),
                top_ks_B=torch.ones(b, **whole),
                top_ps_B=torch.ones(b, **exact),
                min_ps_B=torch.zeros(b, **exact),
                seeds_B=torch.zeros(b, **whole),
                greedy_B=torch.ones(b, dtype=torch.bool, device=device),
                truncated=kind.truncated,
                all_greedy=kind.all_greedy,
            ),
        )

    def fill(self, rows: Sequence[Row], stops: Sequence[Sequence[int]], sampling: SamplingColumns) -> None:
        """Take these rows, each with one output token at least; the slots behind them are without a row."""
        used, slots = len(rows), len(self.alive_B)
        idle = [0] * (slots - used)
        lengths = [len(row.prompt) + len(row.output_ids) for row in rows]
        for column, values in (
            (self.last_B, [row.output_ids[-1] for row in rows]),
            (self.positions_B, [length - 1 for length in lengths]),
            (self.counts_B, [len(row.output_ids) for row in rows]),
            (self.limits_B, [row.limit for row in rows]),
            (self.alive_B, [1] * used),
        ):
            column.copy_(torch.tensor([*values, *idle]))
        width = self.stops_BS.shape[1]
        self.stops_BS[:used] = torch.tensor([[*ids, *[-1] * (width - len(ids))] for ids in stops]).to(
            self.last_B.device
        )
        for f in dataclasses.fields(SamplingColumns):
            column = getattr(self.sampling, f.name)
            if isinstance(column, Tensor):
                column[:used] = getattr(sampling, f.name).to(column.device)


class SlotLayer(DynamicLayer):
    """One layer's keys and values, [B, N, W, H]: a step writes every slot's newest token at its position."""

    def __init__(self, keys: Tensor, values: Tensor, positions_B: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._positions_B = positions_B
        self._slots_B = torch.arange(len(positions_B), device=positions_B.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the states [B, N, 1, H] and return all."""
        self.keys[self._slots_B, :, self._positions_B] = key_states[:, :, 0]
        self.values[self._slots_B, :, self._positions_B] = value_states[:, :, 0]
        return self.keys, self.values


class SlotStep:
    """A step of one kind: its columns, its view of the cache, and the function that is captured."""

    def __init__(
        self,
        model: PreTrainedModel,
        kind: Kind,
        layers: Sequence[tuple[Tensor, Tensor]],
        recorder: RouteRecorder | None,
        experts: str | None = None,
    ) -> None:
        self.model, self.kind, self.experts = model, kind, experts
        self.recorder = recorder if kind.routed else None
        device = layers[0][0].device
        self.columns = SlotColumns.empty(kind, device, recorder.size if recorder else 0)
        positions_B = self.columns.positions_B
        self.cache = Cache(layers=[SlotLayer(keys, values, positions_B) for keys, values in layers])
        self._slots_B = torch.arange(kind.slots, device=device)
        self._places_W = torch.arange(kind.width, device=device)

    def run(self) -> None:
        """Give every row that is alive one more token."""
        c = self.columns
        mask_BW = self._places_W <= c.positions_B[:, None]
        with listening(self.recorder) as heard, experts_by(self.model, self.experts):
            logits_BV = self.model(
                input_ids=c.last_B[:, None],
                position_ids=c.positions_B[:, None],
                attention_mask=masks(self.model, mask_BW[:, None, None, :], c.positions_B[:, None]),
                past_key_values=self.cache,
                use_cache=True,
            ).logits[:, -1]
        if self.recorder and heard:
            c.routes_BWX[self._slots_B, c.positions_B] = self.recorder.stacked(heard, self.kind.slots).flatten(1)
        tokens_B, logprobs_B = sample(logits_BV, c.sampling, c.counts_B)
        c.tokens_BW[self._slots_B, c.positions_B] = tokens_B
        c.logprobs_BW[self._slots_B, c.positions_B] = logprobs_B.double()
        c.last_B.copy_(torch.where(c.alive_B, tokens_B, c.last_B))
        c.counts_B.add_(c.alive_B)
        c.positions_B.add_(c.alive_B)
        ended_B = (c.counts_B >= c.limits_B) | (tokens_B[:, None] == c.stops_BS).any(1)
        c.alive_B.logical_and_(~ended_B)
