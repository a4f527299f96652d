"""Data types of a training step: prompts, sampled responses, batches of columns, losses and metrics.

Legend: T all tokens of the concatenated sequences, prompts included, R trained tokens, B responses.
"""

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from megatron_rl.data.arrays import ArrayEquality
from megatron_rl.data.columns import check_columns

Columns = Mapping[str, Tensor]
"""Tensors by column name. A name ends in ``_T`` (one entry per token) or ``_B`` (one entry per response)."""


@dataclass(frozen=True)
class Prompt:
    """A prompt with its token ids; it is tokenized only once."""

    id: str
    """Unique within the task and stable between runs."""
    input_ids: tuple[int, ...]
    text: str
    answer: str
    """Reference answer for the verifier; its format is defined by the task."""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Response(ArrayEquality):
    """A sampled response: token ids and text, with the log-probabilities and metadata from the rollout engine."""

    id: str
    """Unique within the run: made of run, step, prompt and index within the group."""
    prompt_id: str
    index: int
    """Index within the group, from 0."""
    output_ids: np.ndarray
    """Int32: sampled tokens, with the tokens of an environment between them and the final stop token, if any."""
    logprobs: np.ndarray
    """Float32: log-probability of each output token reported by the engine, in nats; 0 for unsampled tokens."""
    text: str
    finish_reason: str
    """``stop``, ``length``, ``abort``, or ``failed`` if the environment of the response failed."""
    weight_versions: tuple[tuple[int, int, int], ...]
    """(version, start, end): output tokens ``start:end`` were generated with this version of the weights."""
    routes: Tensor | None = field(default=None, compare=False, repr=False)
    """Expert indices that the engine reported, [prompt + output tokens - 1, L, K] (see ``RouteShape``), or None. The
    last token has no entry because the model never processes it."""
    mask_ids: Tensor | None = field(default=None, compare=False, repr=False)
    """Token ids that each output token was sampled from, int32 [output tokens, longest set], -1 as padding and on
    tokens that were not sampled; None if the engine did not return them."""
    observed: tuple[tuple[int, int], ...] = ()
    """(start, end): output tokens ``start:end`` come from an environment. They are not sampled and not trained."""
    turns: tuple[str, ...] = ()
    """Texts between the borders of ``observed``, in turn of the model and of the environment; the first and the last
    are the model's. Empty if the response has no tokens of an environment."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_ids", np.asarray(self.output_ids, np.int32))
        object.__setattr__(self, "logprobs", np.asarray(self.logprobs, np.float32))

    @property
    def answer_text(self) -> str:
        """The text in which the verifier looks for the answer: the last turn of the model."""
        return self.turns[-1] if self.turns else self.text

    @property
    def sampled_text(self) -> str:
        """The text that the model wrote, without that of an environment."""
        return "".join(self.turns[::2]) if self.turns else self.text

    @property
    def sampled(self) -> tuple[bool, ...]:
        """Whether each output token was sampled."""
        mask = [True] * len(self.output_ids)
        for start, end in self.observed:
            mask[start:end] = [False] * (end - start)
        return tuple(mask)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as a JSON object; a tensor is encoded as [dtype, shape, base64 of the bytes]."""
        fields = asdict(replace(self, routes=None, mask_ids=None))
        fields |= {"output_ids": self.output_ids.tolist(), "logprobs": self.logprobs.tolist()}
        for name, tensor in (("routes", self.routes), ("mask_ids", self.mask_ids)):
            if tensor is not None:
                array = tensor.numpy()
                fields[name] = [str(array.dtype), list(array.shape), b64encode(array.tobytes()).decode("ascii")]
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Response":
        """Return the response that ``to_json`` encoded; missing fields get their defaults."""
        columns = ("output_ids", "logprobs")
        values = {name: value if name in columns else _as_tuple(value) for name, value in fields.items()}
        values.pop("last_turn", None)  # of version 0.1
        for name in ("routes", "mask_ids"):
            if values.get(name) is not None:
                dtype, shape, data = values[name]
                values[name] = torch.from_numpy(np.frombuffer(b64decode(data), dtype=dtype).reshape(shape).copy())
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
        """The common part of the ids of the responses, without their index."""
        return self.responses[0].id.rpartition("/")[0]

    @property
    def oldest_version(self) -> int:
        """The oldest weight version that generated a token; -1 if there is no token or no version was reported."""
        return min((version for response in self.responses for version, _, _ in response.weight_versions), default=-1)


@dataclass(frozen=True)
class Batch:
    """Concatenated whole sequences, with per-token and per-response data as columns.

    Entry t of a column ``x_T`` belongs to token t: ``old_logprobs_T[t]`` is the log-probability of token t given the
    tokens before it. ``loss_mask_T`` is True on trained tokens. Invalid columns raise ``ConfigError``.

    Attributes:
        lengths_B: int64, tokens of each sequence, prompt and response together.
        columns: ``loss_mask_T``, and any other columns of ``data/columns.py``.
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
        """Int64 [B]: the number of trained tokens of each response (N_i of the equations)."""
        if "trained_tokens_B" in self:
            return self["trained_tokens_B"]
        counts_B = torch.zeros(len(self), dtype=torch.int64)
        return counts_B.index_add_(0, self.response_ids_T, self["loss_mask_T"].long())

    @property
    def trained_R(self) -> Tensor:
        """Int64 [R]: the positions in T of the trained tokens."""
        return self["loss_mask_T"].nonzero().squeeze(1)

    def add(self, columns: Columns) -> Self:
        """Return a batch with ``columns`` added; columns with the same name are replaced."""
        return replace(self, columns={**self.columns, **columns})

    def outline(self) -> "Batch":
        """Return the per-response columns of the batch, with the counts that need its tokens.

        Counts: ``trained_tokens_B``; with weight versions also ``oldest_versions_B``, ``newest_versions_B``,
        ``known_versions_B`` and ``version_sums_B``. Its size is proportional to the responses, not to the tokens.
        """
        columns = {name: column for name, column in self.columns.items() if name.endswith("_B")}
        if "loss_mask_T" in self:
            columns["trained_tokens_B"] = self.trainable_counts_B
        if "weight_versions_T" in self:
            columns |= _version_columns(self["weight_versions_T"], self.response_ids_T, len(self))
        return Batch(self.lengths_B, columns)

    def token_positions(self, response_ids: Tensor) -> Tensor:
        """Return the positions in T of the tokens of these responses, in this order, int64."""
        return token_positions(self.starts_B[response_ids], self.lengths_B[response_ids])

    def select(self, response_ids: Sequence[int] | Tensor) -> "Batch":
        """Return a batch of the responses with these indices, in this order, with all columns."""
        chosen_B = torch.as_tensor(response_ids, dtype=torch.int64)
        columns = {name: column[chosen_B] for name, column in self.columns.items() if name.endswith("_B")}
        if len(columns) < len(self.columns):
            tokens = self.token_positions(chosen_B)
            columns |= {name: column[tokens] for name, column in self.columns.items() if name.endswith("_T")}
        return Batch(self.lengths_B[chosen_B], columns)

    @staticmethod
    def join(batches: Sequence["Batch"]) -> "Batch":
        """Concatenate batches in order, with the columns that all of them have."""
        shared = set.intersection(*(set(batch.columns) for batch in batches))
        columns = {name: torch.cat([batch[name] for batch in batches]) for name in sorted(shared)}
        return Batch(torch.cat([batch.lengths_B for batch in batches]), columns)

    def split(self, parts: int, seed: Iterable[int]) -> list["Batch"]:
        """Shuffle the responses and split them into ``parts`` mini-batches whose sizes differ by at most one."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(fold_seed(seed)))
        return [self.select(order[part::parts]) for part in range(parts)]


def _version_columns(versions_T: Tensor, response_ids_T: Tensor, responses: int) -> Columns:
    """Return statistics per response of the weight versions of its tokens, without tokens of unknown version (-1)."""
    known_T = versions_T >= 0
    versions, owners = versions_T[known_T], response_ids_T[known_T]
    highest = torch.iinfo(torch.int64).max
    return {
        "oldest_versions_B": torch.full((responses,), highest).scatter_reduce(0, owners, versions, "amin"),
        "newest_versions_B": torch.full((responses,), -1).scatter_reduce(0, owners, versions, "amax"),
        "known_versions_B": torch.bincount(owners, minlength=responses),
        "version_sums_B": torch.zeros(responses, dtype=torch.int64).index_add_(0, owners, versions),
    }


def values_at(column_T: Tensor, ids_N: Tensor) -> Tensor:
    """Return a per-token column at token indices, [N, ...]; entries with index -1 are arbitrary, also of no tokens."""
    if not len(column_T):
        column_T = column_T.new_zeros(1, *column_T.shape[1:])
    return column_T[ids_N.clamp(min=0)]


def token_positions(starts_B: Tensor, lengths_B: Tensor) -> Tensor:
    """Return the concatenation of ``arange(start, start + length)`` over all sequences, int64."""
    offsets_B = starts_B - (lengths_B.cumsum(0) - lengths_B)
    return torch.arange(int(lengths_B.sum())) + torch.repeat_interleave(offsets_B, lengths_B)


def dense_ids(ids_T: Tensor) -> tuple[Tensor, int]:
    """Return the ids renumbered 0, 1, ... in increasing order, int64 [T], and the number of different ids."""
    values, dense_T = torch.unique(ids_T, return_inverse=True)
    return dense_T, len(values)


def fold_seed(parts: Iterable[int]) -> int:
    """Hash a sequence of integers to a 63-bit seed with steps like those of splitmix64."""
    mask = (1 << 64) - 1
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & mask)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1


@dataclass(frozen=True)
class Metrics:
    """Metrics that are reduced over tokens, micro-batches and ranks; means are computed after the reduction.

    Attributes:
        sums: scalars that are reduced by summation, by name.
        maxima: scalars that are reduced by maximum, by name.
        tokens: per-token columns by name. Before the reduction they have one entry per trained token of the
            micro-batch on this rank, as in ``LossInputs``; afterwards one per token of the mini-batch that this replica
            owns, 0 if untrained.
    """

    sums: Columns = field(default_factory=dict)
    maxima: Columns = field(default_factory=dict)
    tokens: Columns = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch.

    Attributes:
        value: scalar to minimize. Token weights contain the global counts, so values of ranks and micro-batches add up.
        metrics: metrics of the micro-batch on this rank.
    """

    value: Tensor
    metrics: Metrics
