"""Finds the origin of the first NaN or inf of a step by rerunning one micro-batch with hooks on every module.

``Policy`` checks for non-finite values during a step and calls these functions on all ranks if it finds one. Every
function is collective. Legend: T tokens of the mini-batch, R trained tokens of this rank, B responses.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from megatron_rl.data.loss_inputs import LossFn
from megatron_rl.data.minibatch import Minibatch
from megatron_rl.data.types import Batch
from megatron_rl.distributed.collectives import (
    broadcast_json,
    broadcast_tensors,
    gather_json,
    group_rank,
    group_size,
    max_over,
)
from megatron_rl.distributed.mesh import Mesh
from megatron_rl.distributed.replicas import CPU
from megatron_rl.errors import TrainingError
from megatron_rl.policy.hf_weights import shards_of
from megatron_rl.policy.rows import RankRow
from megatron_rl.policy.upstream import decoder_layers

if TYPE_CHECKING:
    from megatron_rl.policy.engine import Policy


@dataclass(frozen=True)
class NonFiniteTensor:
    """The first non-finite tensor in the order of the forward pass, or of the backward pass for gradients.

    Attributes:
        kind: ``output``, ``log-prob``, ``loss column``, ``loss`` or ``gradient``; ``none`` if the micro-batch is
            finite when run again alone.
        name: module, column, or Hugging Face name of the parameter.
        layer: global layer index; None outside of the layers.
        rank: lowest rank that holds the tensor.
        sample: ``sample_index_B`` of the first affected response; None if it cannot be attributed to one.
        depth, order: position in the pass.
        weights: Hugging Face names of the non-finite weights.
    """

    kind: str
    name: str
    layer: int | None = None
    rank: int = 0
    sample: int | None = None
    depth: int = 0
    order: int = 0
    weights: tuple[str, ...] = ()

    def words(self) -> str:
        """Return a description for error messages."""
        if self.kind == "none":
            return "a value that is not finite, which did not come up again when its micro-batch was run alone"
        where = "" if self.layer is None else f" in layer {self.layer}"
        sample = "" if self.sample is None else f", sample {self.sample}"
        more = f" and {len(self.weights) - 3} more" if len(self.weights) > 3 else ""
        weights = f"; weights that are not finite: {', '.join(self.weights[:3])}{more}" if self.weights else ""
        return f"NaN or inf in the {self.kind} {self.name}{where}, rank {self.rank}{sample}{weights}"


class NonFiniteError(TrainingError):
    """A step computed NaN or inf. Raised on all ranks before the optimizer step.

    Attributes:
        finding: the first non-finite tensor.
        batch: the responses of its micro-batch.
    """

    def __init__(self, finding: NonFiniteTensor, batch: Batch) -> None:
        super().__init__(f"the step was stopped, the weights are as before it: {finding.words()}")
        self.finding, self.batch = finding, batch


def bad_row(
    mesh: Mesh, finite: Sequence[Tensor], gradients: Iterable[Tensor], num_rows: int
) -> tuple[int | None, bool]:
    """Return (index of the first non-finite row or None, whether a gradient is non-finite), equal on every rank.

    ``finite`` has one bool per row of this rank. Communication is one all-reduce of two numbers.
    """
    flags = torch.stack(list(finite)).tolist() if finite else []
    mine = [place for place, fine in enumerate(flags) if not fine]
    first = group_rank(mesh.data) + mine[0] * group_size(mesh.data) if mine else num_rows
    nonfinite = [~torch.isfinite(torch.stack(torch.aminmax(gradient))).all() for gradient in gradients]
    any_nonfinite = bool(torch.stack(nonfinite).any()) if nonfinite else False
    local_flags = torch.tensor([num_rows - first, int(any_nonfinite)], device=mesh.world.device)
    before_end, gradient = max_over(torch.distributed.group.WORLD, local_flags).tolist()
    return (num_rows - before_end if before_end else None), bool(gradient)


def explain(policy: "Policy", minibatch: Minibatch, row: int | None, loss_fn: LossFn | None) -> NonFiniteError:
    """Return the error for non-finite values in this row, or in the gradients if ``row`` is None."""
    if row is not None:
        batch = _row_batch(policy, minibatch, row)
        found = _forward(policy, batch, loss_fn)
        return _error(policy, batch, found)
    assert loss_fn is not None, "gradients come from a loss"
    for each in range(minibatch.num_rows):
        batch = _row_batch(policy, minibatch, each)
        if len(batch) and (found := _backward(policy, batch, loss_fn)):
            return _error(policy, batch, found)
    return _error(policy, _row_batch(policy, minibatch, 0), ())


def _row_batch(policy: "Policy", minibatch: Minibatch, row: int) -> Batch:
    """Return the responses of one row of the mini-batch, on every rank: its owner sends them to the other replicas."""
    peers, replicas = policy.mesh.peers, policy.mesh.replicas
    owner, index = row % replicas.count, row // replicas.count
    sent: dict[str, Tensor] | None = None
    if owner == replicas.index:
        selected = minibatch.select(minibatch.rows[index].sequences)
        sent = {"lengths_B": selected.lengths_B, **selected.columns}
    columns = broadcast_tensors(sent, owner, CPU, peers)
    assert columns is not None, "the owner always sends"
    return Batch(columns.pop("lengths_B"), columns)


def _error(policy: "Policy", batch: Batch, found: Sequence[NonFiniteTensor]) -> NonFiniteError:
    return NonFiniteError(_first(found, _nonfinite_weights(policy)), policy.replay.all_layers(batch))


def _in_one_row(policy: "Policy", batch: Batch) -> Minibatch:
    return policy.plan(batch.outline(), in_one_row=True).minibatch(batch)


def _first(found: Sequence[NonFiniteTensor], weights: tuple[str, ...]) -> NonFiniteTensor:
    earliest = min(found, key=lambda one: (one.depth, one.order, one.rank), default=NonFiniteTensor("none", ""))
    samples = [one.sample for one in found if one.sample is not None]
    return replace(earliest, sample=min(samples, default=None), weights=weights)


def _gathered(policy: "Policy", findings: Sequence[NonFiniteTensor]) -> list[NonFiniteTensor]:
    """Return the non-finite tensors of all ranks."""
    ranks = gather_json([asdict(one) for one in findings], policy.mesh.world.device)
    return [NonFiniteTensor(**fields) for found in cast(list[list[dict[str, Any]]], ranks) for fields in found]


def _nonfinite_weights(policy: "Policy") -> tuple[str, ...]:
    names = [name for name, tensor in policy.weights(1 << 28) if not bool(tensor.isfinite().all())]
    return tuple(cast(list[str], broadcast_json(names, source=0, device=policy.mesh.world.device)))


@torch.no_grad()
def _forward(policy: "Policy", batch: Batch, loss_fn: LossFn | None) -> list[NonFiniteTensor]:
    """Run one micro-batch alone, forward only; return each rank's first non-finite tensor and those of the loss."""
    found: list[NonFiniteTensor] = []
    with _watched(policy, found):
        step = partial(_inspect, policy, batch, loss_fn, found)
        policy.run_rows(_in_one_row(policy, batch), step, forward_only=True)
    return _gathered(policy, found)


@contextmanager
def _watched(policy: "Policy", found: list[NonFiniteTensor]) -> Iterator[None]:
    """Record the first module of this rank with a non-finite output."""
    rank, last = policy.mesh.world.rank, policy.family.num_layers
    order = iter(range(1 << 60))

    def look(place: tuple[str, int | None], module: nn.Module, inputs: object, output: object) -> None:
        name, layer = place
        number = next(order)
        if not found and any(not bool(tensor.isfinite().all()) for tensor in _floats(output)):
            depth = layer if layer is not None else (-1 if name.startswith("embedding") else last)
            found.append(NonFiniteTensor("output", f"of {name}", layer, rank, depth=depth, order=number))

    hooks = [module.register_forward_hook(partial(look, place)) for place, module in _places(policy)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _places(policy: "Policy") -> Iterator[tuple[tuple[str, int | None], nn.Module]]:
    """Yield ((name within its layer, global layer index or None), module) for every module of this rank."""
    for chunk, layers in decoder_layers(policy.chunks):
        numbers = {f"decoder.layers.{index}": number for index, number in enumerate(layers)}
        for name, module in chunk.named_modules():
            owner = ".".join(name.split(".")[:3])
            inside = name.removeprefix(owner).removeprefix(".") or "the whole layer"
            yield ((inside, numbers[owner]) if owner in numbers else (name or "the model", None)), module


def _floats(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, Sequence):
        for part in cast(Sequence[object], output):
            yield from _floats(part)


NO_TOKENS = torch.zeros((), dtype=torch.int)


def _inspect(
    policy: "Policy",
    batch: Batch,
    loss_fn: LossFn | None,
    found: list[NonFiniteTensor],
    row: RankRow,
    output_2R: Tensor,
) -> tuple[Tensor, Tensor, None]:
    """Check log-probs, entropies, the loss's columns and the loss; called as megatron-core's loss function."""
    mesh, depth = policy.mesh, policy.family.num_layers + 1

    def note(kind: str, name: str, bad_R: Tensor, below: int) -> None:
        if bool(bad_R.any()):
            tokens = row.target_tokens_R[bad_R.cpu().nonzero().flatten()] if bad_R.dim() else row.target_tokens_R[:0]
            responses = batch.response_ids_T[tokens]
            names = batch["sample_index_B"][responses] if "sample_index_B" in batch else responses
            sample = int(names.min()) if len(names) else None
            found.append(NonFiniteTensor(kind, name, None, mesh.world.rank, sample, depth + below))

    note("log-prob", "of the trained tokens", ~output_2R[0].isfinite(), 0)
    note("log-prob", "(their entropy) of the trained tokens", ~output_2R[1].isfinite(), 1)
    if loss_fn is not None:
        assert row.loss_inputs is not None, "the batch lacks the columns of algorithms.loss.prepare"
        value = loss_fn(output_2R[0], output_2R[1], row.loss_inputs).value
        columns = row.loss_inputs.columns()
        for number, (name, column) in enumerate(sorted(columns.items())):
            note("loss column", name, ~column.isfinite(), 2 + number)
        note("loss", "of the micro-batch", ~value.isfinite(), 2 + len(columns))
    return output_2R.sum(), NO_TOKENS, None


def _backward(policy: "Policy", batch: Batch, loss_fn: LossFn) -> list[NonFiniteTensor]:
    """Run one micro-batch alone, forward and backward; return the non-finite gradients of all ranks."""
    if not (found := _nonfinite_gradients(policy, batch, loss_fn)):
        return []
    numbers = batch["sample_index_B"].tolist() if "sample_index_B" in batch else list(range(len(batch)))
    for response, number in enumerate(numbers):
        if alone := _nonfinite_gradients(policy, batch.select([response]), loss_fn):
            return [replace(one, sample=number) for one in alone]
    return found


def _nonfinite_gradients(policy: "Policy", batch: Batch, loss_fn: LossFn) -> list[NonFiniteTensor]:
    policy.run_backward(_in_one_row(policy, batch), loss_fn, whole_gradients=True)
    last = policy.family.num_layers
    found: list[NonFiniteTensor] = []
    shards = [shard for shard in shards_of(policy.chunks, policy.family, policy.mesh) if shard.is_trained]
    for number, shard in enumerate(shards):
        gradient = cast(Tensor, getattr(shard.parameter, "main_grad"))  # noqa: B009 (megatron's, no attribute of Tensor)
        if not bool(gradient.isfinite().all()):
            name = shard.name.megatron
            layer = shard.layer if "{layer}" in name else None
            depth = layer if layer is not None else (-1 if name.startswith("embedding") else last)
            words = "of " + ", ".join(shard.hf_names)
            found.append(NonFiniteTensor("gradient", words, layer, policy.mesh.world.rank, None, -depth, -number))
    return _gathered(policy, found)
