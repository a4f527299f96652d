"""The policy: computes log-probs and gradients of any loss, updates its weights, and exports them.

Every method is collective: all trainer ranks call it in the same order with their parts of the same mini-batch, as
``plan`` distributes it over data-parallel replicas. Pipeline schedules and the exchange of sequences and experts are
internal to it.

Legend: T all tokens of the responses that this replica owns, R trained tokens of one row on this rank.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import TypeVar, cast

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rl.config.schema import Run
from megatron_rl.data.loss_inputs import LossFn
from megatron_rl.data.minibatch import Minibatch, MinibatchPlan
from megatron_rl.data.pack import RowRules, one_row, pack
from megatron_rl.data.step import StepReport
from megatron_rl.data.types import Batch, Columns, Loss, Metrics
from megatron_rl.distributed.collectives import broadcast_json, group_size, max_over, sum_over
from megatron_rl.distributed.mesh import World
from megatron_rl.distributed.rng import rng_states, set_rng_states
from megatron_rl.errors import ConfigError, TrainingError
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.sharded_files import ShardedStateReader, StateSlice, check_model
from megatron_rl.policy.balance import LoadBalancing
from megatron_rl.policy.hf_weights import WeightExport, load_weights, mark_shards, shards_of, tied_copies
from megatron_rl.policy.model import backends_of, build_chunks
from megatron_rl.policy.nonfinite import bad_row, explain
from megatron_rl.policy.optimizer import build_optimizer, build_scheduler, optimizer_parts
from megatron_rl.policy.process_groups import build_mesh
from megatron_rl.policy.reference import Reference
from megatron_rl.policy.routing_replay import Replay
from megatron_rl.policy.rows import RankRow, rank_row
from megatron_rl.policy.sharded_state import (
    PER_RANK,
    load_reference,
    load_sharded_state,
    reference_slices,
    rng_slices,
    state_slices,
)
from megatron_rl.policy.upstream import repair
from megatron_rl.util.megatron_version import untested_megatron

Result = TypeVar("Result")
LossStep = Callable[["RankRow", Tensor], tuple[Tensor, Tensor, Result]]
"""(row, output of the last stage) -> megatron-core's triple: scalar to differentiate, token count, result to keep."""


@dataclass(frozen=True)
class TokenLogprobs:
    """What a forward pass computes for the tokens of this replica's responses, on the CPU; 0 where not trained.

    Attributes:
        logprobs_T: log-probability of the token, nats, float32 (float64 if the model is).
        entropies_T: entropy of the distribution that the token was drawn from, nats, same type.
        routing: the columns of ``Replay.columns``; empty without routing replay.
    """

    logprobs_T: Tensor
    entropies_T: Tensor
    routing: Columns

    def as_old(self) -> Columns:
        """Return the columns of the policy before the update: ``old_logprobs_T``, ``old_entropies_T``, routing."""
        return {"old_logprobs_T": self.logprobs_T, "old_entropies_T": self.entropies_T, **self.routing}

    def as_current(self) -> Columns:
        """Return the column of the policy that an update starts from: ``current_logprobs_T``."""
        return {"current_logprobs_T": self.logprobs_T}

    def as_reference(self) -> Columns:
        """Return the column of the reference policy: ``ref_logprobs_T``."""
        return {"ref_logprobs_T": self.logprobs_T}


class Policy:
    """A megatron-core model with its optimizer and learning-rate schedule; this rank holds a part of each."""

    def __init__(self, run: Run, world: World, total_updates: int) -> None:
        if not run.model.untested_megatron and (refusal := untested_megatron()) is not None:
            raise ConfigError(refusal)
        repair()
        self.family = family_of(read_hf_config(Path(run.model.path)))
        self.mesh = build_mesh(run, world)
        self.chunks = build_chunks(run, self.family, self.mesh)
        mark_shards(shards_of(self.chunks, self.family, self.mesh), self.mesh)
        load_weights(self.chunks, self.family, self.mesh, Path(run.model.path))
        self.balancing = LoadBalancing(self.chunks)
        self.replay = Replay(run.rollout.routing_replay, self.chunks, self.family, self.mesh)
        self._reference = Reference(run, self._parameters) if run.kl.coefficient else None
        self.optimizer = build_optimizer(run, self.chunks)
        self.scheduler = build_scheduler(run.optimizer, self.optimizer, total_updates)
        self.scheduler.step(0)
        by_sequence = backends_of(run, self.mesh).engine or self.family.has_latent_attention
        self._qkv_format = "thd" if by_sequence else "sbhd"
        self._parallel, self._train = run.parallel, run.train

    def _gather_parameters(self) -> None:
        """Gather the parameters that the last update left to the next forward pass (overlap_param_gather)."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def _copy(self) -> list[Tensor]:
        self._gather_parameters()
        return [parameter.detach().cpu().clone() for parameter in self._parameters]

    @property
    def _parameters(self) -> list[Tensor]:
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    @property
    def row_rules(self) -> RowRules:
        """Constraints on packed rows from the layout."""
        return RowRules(
            tokens=self._train.tokens_per_microbatch,
            sequence_multiple=self._parallel.sequence_multiple,
            row_multiple=self._parallel.row_multiple,
            count_multiple=group_size(self.mesh.data) * self._parallel.microbatch_multiple,
            one_sequence_per_row=not self._train.packing,
            balanced_replicas=group_size(self.mesh.data) if self._train.balance == "flops" else 1,
        )

    @property
    def route_layers(self) -> tuple[int, ...]:
        """Which of the model's layers with experts this rank has, ascending: those whose routes it reads."""
        return self.replay.layers

    @property
    def total(self) -> Callable[[Tensor], Tensor]:
        """A function that adds a tensor in host memory over the data-parallel replicas."""
        return self.mesh.replicas.sum

    def plan(self, outline: Batch, *, in_one_row: bool = False) -> MinibatchPlan:
        """Pack a mini-batch: from lengths alone, every rank computes which replica owns which response.

        Args:
            outline: all responses of the mini-batch; only its lengths are read.
            in_one_row: pack all of it into one row of any length, which every replica owns.
        """
        packing = (one_row if in_one_row else pack)(outline.lengths_B, self.row_rules)
        return MinibatchPlan(outline, packing, self.mesh.replicas.index, self.mesh.replicas.count)

    def local_part(self, batch: Batch, *, in_one_row: bool = False) -> Minibatch:
        """Return this replica's part of a mini-batch that every rank holds whole, with the routes of all layers."""
        plan = self.plan(batch.outline(), in_one_row=in_one_row)
        return plan.minibatch(self.replay.local_layers(batch.select(plan.owned())))

    def compute_logprobs(self, minibatch: Minibatch) -> TokenLogprobs:
        """Return log-probs and entropies of this replica's tokens under the current weights; forward only.

        The forward pass is the one of ``forward_backward``: same rows, same kernels, so the first ratios are exactly 1.
        """
        with self.replay.recording() as routes:
            logprobs_T, entropies_T = self._forward_only(minibatch)
        return TokenLogprobs(logprobs_T, entropies_T, self.replay.columns(routes, minibatch))

    @torch.no_grad()
    def _forward_only(self, minibatch: Minibatch) -> tuple[Tensor, Tensor]:
        results = self.run_rows(minibatch, _keep_output, forward_only=True)
        self._stop_at_nonfinite(minibatch, [output_2R.isfinite().all() for _, output_2R in results])
        columns = self._gather(("logprobs", "entropies"), minibatch, results)
        return columns["logprobs"], columns["entropies"]

    def _gather(self, names: Sequence[str], batch: Batch, parts: Sequence[tuple[RankRow, Tensor]]) -> Columns:
        """Return columns over the tokens of this replica, on the CPU, from the [names, R] values of each row."""
        total = int(batch.lengths_B.sum())
        dtype = torch.float64 if self.chunks[0].config.params_dtype is torch.float64 else torch.float32
        found_NT = torch.zeros(len(names), total, dtype=dtype, device=self.mesh.world.device)
        if self.mesh.reports_tokens:
            for row, values_NR in parts:
                found_NT.index_copy_(1, row.target_tokens_R.to(found_NT.device), values_NR.to(dtype))
        return dict(zip(names, sum_over(self.mesh.replica, found_NT.cpu()), strict=True))

    @contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Compute with the reference policy's weights inside a ``with`` block; routers are not replayed.

        Raises:
            TrainingError: no reference was kept.
        """
        if self._reference is None:
            raise TrainingError("no reference policy was kept; set kl.coefficient above 0 before the run starts")
        with self.preserve_weights(), self.replay.off():
            _overwrite(self._parameters, self._reference.values)
            yield

    def forward_backward(self, minibatch: Minibatch, loss_fn: LossFn, whole_gradients: bool = False) -> Metrics:
        """Compute the gradient of the loss over the mini-batch; return metrics summed over all tokens and ranks.

        ``Metrics.tokens`` has the tokens of this replica.

        Args:
            minibatch: this replica's part of the mini-batch, with the columns that the loss reads.
            loss_fn: the loss of a micro-batch.
            whole_gradients: leave every rank with the gradients of all its parameters, so that ``gradients`` can read
                them, where the distributed optimizer would keep only this rank's shard.

        Raises:
            NonFiniteError: NaN or inf in a log-prob, a loss or a gradient, on any rank.
        """
        self.balancing.share_between(minibatch)
        results = self.run_backward(minibatch, loss_fn, whole_gradients)
        self._stop_at_nonfinite(minibatch, [finite for _, (_, finite) in results], loss_fn)
        return self._reduce(minibatch, [(row, loss.metrics) for row, (loss, _) in results])

    def run_backward(
        self, minibatch: Minibatch, loss_fn: LossFn, whole_gradients: bool
    ) -> list[tuple[RankRow, tuple[Loss, Tensor]]]:
        """Zero the gradients, then accumulate those of these rows; return (loss, whether it is finite) per row."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
            chunk.force_all_reduce = whole_gradients  # for buckets reduced during the backward pass
        self.optimizer.zero_grad()
        step = partial(_differentiable, loss_fn)
        return self.run_rows(minibatch, step, forward_only=False, force_all_reduce=whole_gradients)

    def _stop_at_nonfinite(self, minibatch: Minibatch, finite: Sequence[Tensor], loss_fn: LossFn | None = None) -> None:
        """Raise on all ranks if any rank has NaN or inf in a row or, after a backward pass, in a gradient."""
        buffers = [*chain.from_iterable(chunk.buffers + chunk.expert_parallel_buffers for chunk in self.chunks)]
        gradients = [buffer.grad_data for buffer in buffers] if loss_fn else []
        row, nonfinite = bad_row(self.mesh, finite, gradients, minibatch.num_rows)
        if row is not None or nonfinite:
            raise explain(self, minibatch, row, loss_fn)

    def optim_step(self) -> StepReport:
        """Clip the gradients, step the optimizer, advance the learning-rate schedule.

        Raises:
            TrainingError: the gradients are finite but their norm is not.
        """
        lr = float(self.optimizer.param_groups[0]["lr"])
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise TrainingError(f"the norm of the gradients is {grad_norm}: each is finite, their squares overflow")
        self.scheduler.step(1)
        if self._reference is not None:
            self._reference.follow(self._parameters, self.updates)
        return StepReport(float(grad_norm), lr)

    @contextmanager
    def preserve_weights(self) -> Iterator[None]:
        """Restore the parameters at the end of a ``with`` block; optimizer state is not restored."""
        saved = self._copy()
        try:
            yield
        finally:
            _overwrite(self._parameters, saved)

    def sharded_state(self) -> list[tuple[StateSlice, Tensor]]:
        """Return this rank's slices of model, optimizer and random generators, sharing memory with the policy.

        The union over all ranks contains every element once and can be loaded under any layout.
        """
        self._gather_parameters()
        shards, parts = shards_of(self.chunks, self.family, self.mesh), optimizer_parts(self.optimizer)
        random = rng_slices(rng_states(self.mesh.world.device), self.mesh)
        reference = reference_slices(shards, self._saved_reference(), self.mesh)
        return [*state_slices(shards, parts, self.mesh), *reference, *random.values()]

    def load_sharded_state(self, reader: ShardedStateReader, updates: int, *, same_layout: bool) -> None:
        """Restore a state saved after ``updates`` optimizer steps, written under any layout.

        Random generators are restored only if the layout is the same.

        Raises:
            DataError: the slices belong to another model, are incomplete or damaged.
        """
        check_model(reader, self.family)
        shards = [*shards_of(self.chunks, self.family, self.mesh), *tied_copies(self.chunks, self.family)]
        load_sharded_state(reader, shards, optimizer_parts(self.optimizer), self.mesh, updates)
        load_reference(reader, shards, self._saved_reference(), self.mesh)
        if same_layout:
            random = rng_slices(rng_states(self.mesh.world.device), self.mesh)
            states = {name: reader.read(place, PER_RANK) for name, (place, _) in random.items()}
            set_rng_states(self.mesh.world.device, states)
        self.scheduler.step(updates - self.updates)

    def _saved_reference(self) -> dict[Tensor, Tensor]:
        return {} if self._reference is None else self._reference.saved(self._parameters)

    @property
    def updates(self) -> int:
        """Optimizer steps taken since the start of the run."""
        return self.scheduler.num_steps

    def weights(self, bucket_bytes: int) -> WeightExport:
        """Return an iterable over (Hugging Face name, tensor); all ranks must iterate, rank 0 gets the tensors."""
        self._gather_parameters()
        return WeightExport(shards_of(self.chunks, self.family, self.mesh), self.mesh, bucket_bytes)

    def gradients(self) -> WeightExport:
        """Return the gradient of the last ``forward_backward(..., whole_gradients=True)``, named as by ``weights``."""
        weights = self.weights(1 << 28)
        trained = [shard for shard in weights.shards if shard.is_trained]
        return replace(weights, shards=trained, pick=attrgetter("main_grad"))

    def run_rows(
        self, minibatch: Minibatch, loss_step: LossStep[Result], forward_only: bool, force_all_reduce: bool = False
    ) -> list[tuple[RankRow, Result]]:
        """Run this replica's rows in megatron-core's schedule; return (row, result) pairs, only on the last stage."""
        rows = [rank_row(row, minibatch, self.mesh, self._qkv_format) for row in minibatch.rows]
        rows = [self.replay.arm(row, minibatch) for row in rows]
        results = get_forward_backward_func()(
            forward_step_func=partial(_forward, loss_step, self.balancing.is_on),
            data_iterator=[map(self.replay.on_device, rows) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(rows),
            seq_length=minibatch.rows[0].length,
            micro_batch_size=1,
            forward_only=forward_only,
            force_all_reduce=force_all_reduce,
        )
        return list(zip(rows, results, strict=True)) if self.mesh.is_last_stage else []

    def _reduce(self, batch: Batch, metrics: Sequence[tuple[RankRow, Metrics]]) -> Metrics:
        """Reduce every metric over micro-batches and ranks by sum or maximum; scatter per-token values to the batch."""
        world, device = torch.distributed.group.WORLD, self.mesh.world.device
        sums = _combine([metric.sums for _, metric in metrics], torch.sum)
        maxima = _combine([metric.maxima for _, metric in metrics], torch.amax)
        last_rank = self.mesh.world.size - 1
        local_names = {
            "sums": list(sums),
            "maxima": list(maxima),
            "tokens": list(metrics[0][1].tokens) if metrics else [],
        }
        names = cast(dict[str, list[str]], broadcast_json(local_names, source=last_rank, device=device))
        reported = self.mesh.reports_tokens
        local_sums = _in_order(sums if reported else {}, names["sums"], 0.0, device)
        local_maxima = _in_order(maxima if reported else {}, names["maxima"], -math.inf, device)
        totals, largest = sum_over(world, local_sums).cpu(), max_over(world, local_maxima).cpu()
        tokens: Columns = {}
        if token_names := names["tokens"]:
            parts = [(row, torch.stack([metric.tokens[name] for name in token_names])) for row, metric in metrics]
            tokens = self._gather(token_names, batch, parts)
        return Metrics(
            dict(zip(names["sums"], totals, strict=True)), dict(zip(names["maxima"], largest, strict=True)), tokens
        )


def _in_order(values: Columns, names: Sequence[str], missing: float, device: torch.device) -> Tensor:
    """Return the named values in one tensor, without a device synchronization."""
    if not values:
        return torch.full((len(names),), missing, dtype=torch.float64, device=device)
    return torch.stack([values[name].double() for name in names])


@torch.no_grad()
def _overwrite(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _forward(
    loss_step: LossStep[Result], balanced: bool, rows: Iterator[RankRow], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Result]]]:
    """megatron-core's forward step: run one row; return the output and the function from output to loss."""
    row = next(rows)
    output = model(
        input_ids=row.input_ids_T[None],
        position_ids=row.position_ids_T[None],
        attention_mask=None,
        packed_seq_params=row.packed,
        labels=row.targets_R,
        loss_mask=row.trained_R,
        padding_mask=row.padding_T[None] if balanced else None,
    )
    return output, partial(loss_step, row)


NO_TOKENS = torch.zeros((), dtype=torch.int)
"""Token count for megatron-core's normalization, unused because losses have their own denominators."""


def _keep_output(row: RankRow, output_2R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return output_2R.sum(), NO_TOKENS, output_2R


def _differentiable(loss_fn: LossFn, row: RankRow, output_2R: Tensor) -> tuple[Tensor, Tensor, tuple[Loss, Tensor]]:
    logprobs_R, entropies_R = output_2R
    assert row.loss_inputs is not None, "the batch lacks the columns of algorithms.loss.prepare"
    loss = loss_fn(logprobs_R, entropies_R, row.loss_inputs)
    finite = output_2R.isfinite().all() & loss.value.isfinite()
    return loss.value, NO_TOKENS, (Loss(loss.value.detach(), loss.metrics), finite)


def _combine(parts: Sequence[Columns], how: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {name: how(torch.stack([part[name] for part in parts]), dim=0) for name in (parts[0] if parts else ())}
