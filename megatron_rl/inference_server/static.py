"""Batches that decode in slots: the host looks only now and then, and the steps between can be CUDA graphs.

    prefill -> DecodeBatch -> StaticBatch: rows move into slots -> burst of steps -> look: who has ended? -> ...

Rows move, all at once, when a batch begins or another joins, when the cache becomes too narrow, and when so many have
ended that a smaller kind of step will do. A move goes through plain rows: tokens are read back, and only keys and
values are copied.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_rl.inference_server.decode import Batch, DecodeBatch, stops_of
from megatron_rl.inference_server.experts import NAME, takes_every_expert
from megatron_rl.inference_server.requests import Row
from megatron_rl.inference_server.routes import RouteRecorder
from megatron_rl.inference_server.sampler import SamplingColumns
from megatron_rl.inference_server.slots import Kind, SlotColumns, SlotStep, size_class
from megatron_rl.ops.graphs import Graphs

_LEAST_WIDTH = 64
Source = Callable[[int, int], Tensor]
"""Layer number and 0 for keys, 1 for values -> a copy of some rows' states, [rows, N, positions from 0 on, H]."""


class StaticDecoder:
    """The memory of keys and values, which stays where it is, and a step of each kind that was needed so far."""

    def __init__(
        self, model: PreTrainedModel, recorder: RouteRecorder, graphs: Graphs, burst: int | None = None
    ) -> None:
        self.model = model
        self.recorder = recorder
        self.graphs = graphs
        self.burst = burst or (8 if graphs.device.type == "cuda" else 1)
        """Most steps between two looks."""
        grouped = graphs.device.type != "cuda" or model.dtype == torch.bfloat16
        self.experts = None if grouped or not takes_every_expert(model) else NAME
        self._capacity = 0
        self._memory: list[list[Tensor]] = []
        """Keys and values of every layer, flat."""
        self._steps: dict[Kind, tuple[SlotStep, Callable[[], None]]] = {}

    def cache(self, kind: Kind, num_layers: int, sources: Sequence[Source]) -> list[tuple[Tensor, Tensor]]:
        """Return every layer's keys and values as this kind sees them, with the sources' rows in the first slots."""
        if kind.slots * kind.width > self._capacity:
            self._steps.clear()  # graphs know addresses
            self._capacity = kind.slots * kind.width
        self._memory += [[torch.empty(0), torch.empty(0)] for _ in range(num_layers - len(self._memory))]
        return [(self._view(kind, n, 0, sources), self._view(kind, n, 1, sources)) for n in range(num_layers)]

    def _view(self, kind: Kind, number: int, which: int, sources: Sequence[Source]) -> Tensor:
        parts = [source(number, which) for source in sources]
        _, heads, _, size = parts[0].shape
        if self._memory[number][which].numel() < self._capacity * heads * size:
            self._memory[number][which] = parts[0].new_empty(self._capacity * heads * size)
        flat = self._memory[number][which][: kind.slots * kind.width * heads * size]
        # Zeros, since what is not a number would stay so also under a mask.
        view = flat.view(kind.slots, heads, kind.width, size).zero_()
        start = 0
        for part in parts:
            used = min(part.shape[2], kind.width)
            view[start : start + len(part), :, :used] = part[:, :, :used]
            start += len(part)
        return view

    def step(self, kind: Kind, layers: Sequence[tuple[Tensor, Tensor]]) -> SlotStep:
        """Return the step of this kind."""
        if kind not in self._steps:
            step = SlotStep(self.model, kind, layers, self.recorder, self.experts)
            # No slot has a row yet, so that running it changes nothing; what it writes to the cache is at position 0.
            kept = [(keys[:, :, :1].clone(), values[:, :, :1].clone()) for keys, values in layers]
            self._steps[kind] = step, self.graphs.record(step.run)
            for (keys, values), (old_keys, old_values) in zip(layers, kept, strict=True):
                keys[:, :, :1], values[:, :, :1] = old_keys, old_values
        return self._steps[kind][0]

    def run(self, kind: Kind) -> None:
        """Run the step of this kind once."""
        self._steps[kind][1]()


class StaticBatch(Batch):
    """Rows in slots."""

    def __init__(self, decoder: StaticDecoder, batch: DecodeBatch, eos: Sequence[int]) -> None:
        self.decoder = decoder
        self.eos = eos
        self.rows: list[Row] = []
        self.live: dict[int, Row] = {}
        self._seeds: list[int] = []
        self._known: list[int] = []
        """Output tokens of each row when it came into its slot."""
        self._counts: list[int] = []
        self._step: SlotStep | None = None
        self._move(batch)

    @property
    def columns(self) -> SlotColumns:
        """What the device knows of each slot."""
        assert self._step is not None
        return self._step.columns

    def join(self, other: DecodeBatch) -> "StaticBatch":
        """Take the live rows of another batch too."""
        self._move(other)
        return self

    def step(self) -> list[Row]:
        """Give every live row some more tokens; return the rows that this finished."""
        assert self._step is not None
        longest = max(row.limit - self._counts[i] for i, row in self.live.items())
        burst = min(1 if self.stop_strings else self.decoder.burst, longest)
        if self._last_position() + burst >= self._step.kind.width:
            self._move()
        for _ in range(burst):
            self.decoder.run(self._step.kind)
        return self._look()

    def _look(self) -> list[Row]:
        """Ask the device, once, which rows have ended."""
        c = self.columns
        self._counts, alive = torch.stack([c.counts_B, c.alive_B.long()]).tolist()
        ended = [i for i in self.live if not alive[i]]
        self._write_back(ended)
        for row in (self.rows[i] for i in ended):
            # SGLang looks at the length first: a stop token in the last place counts as "length".
            length = len(row.output_ids)
            at_limit = length >= row.limit
            row.finish = (
                {"type": "length", "length": length} if at_limit else {"type": "stop", "matched": row.output_ids[-1]}
            )
        return self._remove(ended)

    def counts(self) -> list[int]:
        """See ``Batch``."""
        return [self._counts[i] for i in self.live]

    def _remove(self, ids: Sequence[int]) -> list[Row]:
        if not ids:
            return []
        assert self._step is not None
        removed = [self.live.pop(i) for i in ids]
        self.columns.alive_B[torch.tensor(ids, dtype=torch.int64, device=self.decoder.graphs.device)] = False
        if self.live and size_class(len(self.live)) < self._step.kind.slots:
            self._move()
        return removed

    def _write_back(self, ids: Sequence[int]) -> None:
        if not ids:
            return
        c, slots = self.columns, torch.tensor(ids, device=self.decoder.graphs.device)
        tokens_RW, logprobs_RW = c.tokens_BW[slots].tolist(), c.logprobs_BW[slots].tolist()
        for i, tokens_W, logprobs_W in zip(ids, tokens_RW, logprobs_RW, strict=True):
            row, known, count = self.rows[i], self._known[i], self._counts[i]
            first = len(row.prompt) + known - 1
            row.output_ids = row.output_ids[:known] + tokens_W[first : first + count - known]
            row.logprobs = row.logprobs[:known] + logprobs_W[first : first + count - known]
            if row.prefix_routes is not None:
                newer_TX = c.routes_BWX[i, len(row.prefix_routes) : len(row.prompt) + count - 1].cpu()
                row.routes = torch.cat([row.prefix_routes, newer_TX.view(-1, *row.prefix_routes.shape[1:])])

    def _last_position(self) -> int:
        return max(len(row.prompt) + self._counts[i] for i, row in self.live.items()) - 1

    def _move(self, joined: DecodeBatch | None = None) -> None:
        """Put the live rows, and those of another batch, into slots of a kind that suits them."""
        kept = list(self.live)
        self._write_back(kept)
        sources: list[Source] = [self._source(kept)] if kept else []
        rows, seeds = [self.rows[i] for i in kept], [self._seeds[i] for i in kept]
        if joined is not None and joined.live:
            more = list(joined.live)
            joined.write_back(more)
            rows, seeds = rows + [joined.rows[i] for i in more], seeds + [joined.seeds[i] for i in more]
            sources.append(_aligned(joined, more))
        self.rows, self.live, self._seeds = rows, dict(enumerate(rows)), seeds
        self._counts = [len(row.output_ids) for row in rows]
        self._known = list(self._counts)
        self.stop_strings = any(row.params.stop_strings for row in rows)
        for row in rows:
            row.prefix_routes = row.routes if row.prefix_routes is not None else None
        if rows:
            self._settle(sources)

    def _settle(self, sources: Sequence[Source]) -> None:
        decoder, rows = self.decoder, self.rows
        config = decoder.model.config.get_text_config()
        sampling = SamplingColumns.of([row.params for row in rows], self._seeds, config.vocab_size)
        stops = [stops_of(row, self.eos) for row in rows]
        kind = Kind(
            size_class(len(rows)),
            size_class(self._last_position() + decoder.burst + 1, _LEAST_WIDTH),
            size_class(max(map(len, stops))),
            sampling.truncated,
            sampling.all_greedy,
            any(row.prefix_routes is not None for row in rows),
        )
        layers = decoder.cache(kind, config.num_hidden_layers, sources)
        self._step = decoder.step(kind, layers)
        self._step.columns.fill(rows, stops, sampling)

    def _source(self, ids: Sequence[int]) -> Source:
        step = self._step
        assert step is not None
        slots = torch.tensor(ids, device=self.decoder.graphs.device)

        def states(number: int, which: int) -> Tensor:
            layer = step.cache.layers[number]
            return (layer.values if which else layer.keys)[slots]

        return states


def _aligned(batch: DecodeBatch, ids: Sequence[int]) -> Source:
    """Return the states of rows whose cache ends at the last position, moved to begin at the first."""
    width = batch.cache.width
    places = torch.tensor(ids, device=batch.columns.lengths_B.device)
    shifts_R = width - batch.columns.lengths_B[places]
    # What is behind a row's last token is masked; that token again is as good as any other number.
    from_RK = (torch.arange(width, device=places.device) + shifts_R[:, None]).clamp(max=width - 1)

    def states(number: int, which: int) -> Tensor:
        layer = batch.cache.layers[number]
        states_RNKH = (layer.values if which else layer.keys)[places]
        _, heads, _, size = states_RNKH.shape
        return states_RNKH.gather(2, from_RK[:, None, :, None].expand(-1, heads, -1, size))

    return states
