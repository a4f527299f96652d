"""What flows through a step: prompts, sampled responses, and the columns of a batch.

Legend: T all tokens of the sequences end to end, prompts included, R trained tokens, B responses.
"""

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rl.data.columns import check_columns

Columns = Mapping[str, Tensor]
"""Named columns. A name ends in ``_T`` (one entry per token) or ``_B`` (one entry per response)."""


@dataclass(frozen=True)
class Prompt:
    """One question, tokenised once and never again."""

    id: str
    """Unique within the task and stable between runs."""
    input_ids: tuple[int, ...]
    text: str
    answer: str
    """What the verifier compares with; its meaning is the task's."""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Response:
    """One sampled answer, as token ids, with what the engine said about them."""

    id: str
    """Names the sample: run, step, prompt and index within the group. No two samples of a run share it."""
    prompt_id: str
    index: int
    """Position within the group."""
    output_ids: tuple[int, ...]
    """Sampled tokens, and those of an environment between them; the stop token, if there was one, is the last."""
    logprobs: tuple[float, ...]
    """The engine's own log-probability of each output token, in nats; 0 where it was not sampled."""
    text: str
    finish_reason: str
    """``stop``, ``length`` or ``abort``; ``failed`` if the response's environment did."""
    weight_versions: tuple[tuple[int, int, int], ...]
    """(version, start, end): which weights made which output tokens."""
    routes: Tensor | None = field(default=None, compare=False, repr=False)
    """The experts that the engine chose: [prompt + output tokens - 1, L, K] as of ``RouteShape``; None: not returned.
    The last token was never read by the model, so it has none."""
    observed: tuple[tuple[int, int], ...] = ()
    """(start, end): output tokens that an environment put in. They are not sampled, so they are not trained."""
    last_turn: str | None = None
    """The text since the last of those; None where there are none."""

    @property
    def answer_text(self) -> str:
        """What a verifier looks for the answer in: what the model itself said last."""
        return self.text if self.last_turn is None else self.last_turn

    @property
    def sampled(self) -> tuple[bool, ...]:
        """Whether each output token was sampled."""
        mask = [True] * len(self.output_ids)
        for start, end in self.observed:
            mask[start:end] = [False] * (end - start)
        return tuple(mask)

    def to_json(self) -> dict[str, Any]:
        """Return every field as JSON: tuples become lists, routes [dtype, shape, base64 of the bytes]."""
        fields = asdict(replace(self, routes=None))
        if self.routes is not None:
            array = self.routes.numpy()
            fields["routes"] = [str(array.dtype), list(array.shape), b64encode(array.tobytes()).decode("ascii")]
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Response":
        """Return what ``to_json`` wrote; fields that it did not have yet get their defaults."""
        values = {name: _as_tuple(value) for name, value in fields.items()}
        if values.get("routes") is not None:
            dtype, shape, data = values["routes"]
            values["routes"] = torch.from_numpy(np.frombuffer(b64decode(data), dtype=dtype).reshape(shape).copy())
        return cls(**values)


def _as_tuple(value: Any) -> Any:
    return value if isinstance(value, str) or not isinstance(value, Sequence) else tuple(map(_as_tuple, value))


@dataclass(frozen=True)
class Group:
    """All responses to one prompt."""

    prompt: Prompt
    responses: tuple[Response, ...]

    @property
    def id(self) -> str:
        """The ids of its responses without their index."""
        return self.responses[0].id.rpartition("/")[0]

    @property
    def oldest_version(self) -> int:
        """The oldest weights that made a token; -1 where there is no token or the engine did not say."""
        return min((version for response in self.responses for version, _, _ in response.weight_versions), default=-1)


@dataclass(frozen=True)
class Batch:
    """Whole sequences laid end to end, with everything that does not depend on the weights as columns.

    Token column ``x_T[t]`` belongs to token t itself: ``old_logprobs_T[t]`` is the log-probability of token t given the
    tokens before it. ``loss_mask_T`` is True on the tokens that are trained.

    Attributes:
        lengths_B: int64, tokens of each sequence, prompt and response together.
        columns: ``input_ids_T`` and ``loss_mask_T``, and any others of ``data/columns.py``.
    """

    lengths_B: Tensor
    columns: Columns

    def __post_init__(self) -> None:
        check_columns(self.lengths_B, self.columns)

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __len__(self) -> int:
        return len(self.lengths_B)

    @property
    def response_ids_T(self) -> Tensor:
        """Int64 [T]: the index within the batch of the response that each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths_B)

    @property
    def starts_B(self) -> Tensor:
        """Int64 [B]: the position in T of each sequence's first token."""
        return self.lengths_B.cumsum(0) - self.lengths_B

    @property
    def trainable_counts_B(self) -> Tensor:
        """Int64 [B]: the number of trained tokens of each response (N_i of the spec)."""
        counts_B = torch.zeros(len(self), dtype=torch.int64)
        return counts_B.index_add_(0, self.response_ids_T, self["loss_mask_T"].long())

    @property
    def trained_R(self) -> Tensor:
        """Int64 [R]: the positions in T of the trained tokens."""
        return self["loss_mask_T"].nonzero().squeeze(1)

    def add(self, columns: Columns) -> "Batch":
        """Return the batch with more columns, or with some replaced."""
        return replace(self, columns={**self.columns, **columns})

    def select(self, response_ids: Sequence[int] | Tensor) -> "Batch":
        """Return the batch of these responses, in this order, with all columns."""
        chosen_B = torch.as_tensor(response_ids, dtype=torch.int64)
        tokens = token_positions(self.starts_B[chosen_B], self.lengths_B[chosen_B])
        columns = {n: c[tokens] if n.endswith("_T") else c[chosen_B] for n, c in self.columns.items()}
        return Batch(self.lengths_B[chosen_B], columns)

    @staticmethod
    def join(batches: Sequence["Batch"]) -> "Batch":
        """Return the responses of all batches, in order, with the columns that all of them have."""
        shared = set.intersection(*(set(batch.columns) for batch in batches))
        columns = {name: torch.cat([batch[name] for batch in batches]) for name in sorted(shared)}
        return Batch(torch.cat([batch.lengths_B for batch in batches]), columns)

    def split(self, parts: int, seed: Iterable[int]) -> list["Batch"]:
        """Deal the responses, shuffled by the seed, into mini-batches whose sizes differ by at most one."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(fold_seed(seed)))
        return [self.select(order[part::parts]) for part in range(parts)]


def token_positions(starts_B: Tensor, lengths_B: Tensor) -> Tensor:
    """Return the concatenation of ``arange(start, start + length)`` over all sequences, int64."""
    offsets_B = starts_B - (lengths_B.cumsum(0) - lengths_B)
    return torch.arange(int(lengths_B.sum())) + torch.repeat_interleave(offsets_B, lengths_B)


def dense_ids(ids_T: Tensor) -> tuple[Tensor, int]:
    """Return the ids renumbered 0, 1, ... in increasing order, and how many different ones there are."""
    values, dense_T = torch.unique(ids_T, return_inverse=True)
    return dense_T, len(values)


def fold_seed(parts: Iterable[int]) -> int:
    """Fold several integers into one 63-bit seed; different sequences give unrelated seeds (splitmix64 steps)."""
    mask = (1 << 64) - 1
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & mask)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1


@dataclass(frozen=True)
class Metrics:
    """Numbers that add up (or take the largest) over tokens, micro-batches and ranks; means come at the very end.

    Attributes:
        sums: scalars.
        maxima: scalars.
        tokens: columns that the loss was asked to keep: of a micro-batch's trained tokens on one rank, like those of
            ``LossInputs``; once added up, of all tokens of the mini-batch, 0 where untrained.
    """

    sums: Columns = field(default_factory=dict)
    maxima: Columns = field(default_factory=dict)
    tokens: Columns = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """A scalar to minimise (already weighted by global counts: ranks and micro-batches just add up) and its metrics."""

    value: Tensor
    metrics: Metrics
