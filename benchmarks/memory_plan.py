"""The plan's memory compared with measured peaks: python benchmarks/memory_plan.py [--case WORDS] [--write FILE]

Builds the real policy on one or more ranks, runs a log-prob pass, a backward pass over full rows and an optimizer step,
and counts bytes by category. On a CPU the storage of every tensor is tracked (benchmarks/live_bytes.py); on a GPU
torch's allocator counts. Activations are the peak above the memory in use before the pass. Under torchrun each process
is a rank of the one ``--case``.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.common import table
from benchmarks.live_bytes import LiveBytes
from megatron_rl.config.schema import Run
from megatron_rl.data.types import Batch
from megatron_rl.launch.planning.layout import layout_of
from megatron_rl.launch.planning.memory import RankMemory, stage_memory
from megatron_rl.launch.planning.microbatch import full_microbatch
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from megatron_rl.policy.engine import Policy

COMMON = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 160, "norm_topk_prob": True}
MODELS: Mapping[str, Mapping[str, object]] = {
    "llama": {**COMMON, "model_type": "llama"},
    "qwen3": {**COMMON, "model_type": "qwen3"},
    "qwen3_moe": {**COMMON, **EXPERTS, "model_type": "qwen3_moe", "num_experts": 8, "mlp_only_layers": [0]},
    "deepseek_v3": {
        **COMMON,
        **EXPERTS,
        "model_type": "deepseek_v3",
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 72,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 24,
        "num_key_value_heads": 8,
        "n_group": 1,
        "topk_group": 1,
    },
}
"""Small models whose widths all differ, so that no term of the plan can be mistaken for another."""

LENGTHS = (128,) * 8
"""Sequence lengths of one full row."""


@dataclass(frozen=True)
class Case:
    """A model, its settings, and the number of ranks."""

    model: str
    words: tuple[str, ...] = ()
    ranks: int = 1

    @property
    def name(self) -> str:
        """The name of its row in the table."""
        return " ".join([self.model, *(word.partition(".")[2] for word in self.words)])


CASES = (
    Case("llama", ("model.dtype=float32",)),
    Case("qwen3", ("model.dtype=float32", "model.recompute=full")),
    *(Case("qwen3_moe", ("model.dtype=bfloat16", f"model.recompute={how}")) for how in ("none", "selective", "full")),
    *(Case("deepseek_v3", ("model.dtype=bfloat16", f"model.recompute={how}")) for how in ("none", "full")),
    Case("qwen3_moe", ("model.dtype=bfloat16", "parallel.tensor=2"), 2),
    Case("qwen3_moe", ("model.dtype=bfloat16", "parallel.expert=2"), 2),
    Case("qwen3_moe", ("model.dtype=bfloat16", "parallel.expert=2", "parallel.distributed_optimizer=false"), 2),
    Case("qwen3_moe", ("model.dtype=bfloat16", "parallel.tensor=2", "parallel.expert=2", "model.recompute=full"), 2),
    Case("qwen3_moe", ("model.dtype=bfloat16", "parallel.context=2"), 2),
    Case("qwen3_moe", ("model.dtype=bfloat16", "parallel.pipeline=2"), 2),
    Case("qwen3_moe", ("model.dtype=bfloat16", "parallel.pipeline=2", "parallel.virtual_pipeline=2"), 2),
    Case("deepseek_v3", ("model.dtype=bfloat16", "parallel.tensor=2", "parallel.expert=2"), 2),
)


@dataclass
class Measured:
    """Bytes of one rank by category."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    reduction: int = 0
    """Additional bytes of the gradient reduction; 0 where it works in place."""


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the tensors' storages; a shared storage counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class Meter:
    """Measures the peak bytes since the start or the last reading, above the level at the start."""

    def __init__(self) -> None:
        self._live = None if torch.cuda.is_available() else LiveBytes()
        self._base = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count during a ``with`` block."""
        if self._live is None:
            self._base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            yield
        else:
            with self._live:
                yield

    def read(self) -> int:
        """Return the peak since the last reading and restart from the current level."""
        if self._live is None:
            peak = torch.cuda.max_memory_allocated() - self._base
            torch.cuda.reset_peak_memory_stats()
            return peak
        peak, self._live.peak = self._live.peak, self._live.live
        return peak


def full_batch(run: Run, lengths: Sequence[int], rows: int) -> Batch:
    """Return rows of sequences of these lengths; all tokens except the first of each sequence are trained."""
    lengths_B = torch.tensor([*lengths] * rows)
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(0, 64, (int(lengths_B.sum()),), generator=generator)
    mask_T = torch.ones(len(ids_T), dtype=torch.bool)
    mask_T[lengths_B.cumsum(0) - lengths_B] = False
    names = ("old_logprobs_T", "advantages_T", "weights_T", "response_shares_T")
    unused = dict.fromkeys(names, torch.zeros(len(ids_T)))  # the loss below reads none of them
    return Batch(lengths_B, {"input_ids_T": ids_T, "loss_mask_T": mask_T, **unused})


def measure(run: Run, lengths: Sequence[int], rows: int) -> Measured:
    """Return the memory of this rank for a step over ``rows`` rows of sequences of these lengths."""
    from megatron_rl.data.loss_inputs import LossInputs
    from megatron_rl.data.types import Loss, Metrics
    from megatron_rl.distributed.mesh import start_world
    from megatron_rl.policy.engine import Policy

    def loss_fn(logprobs_K: Tensor, entropies_K: Tensor, inputs: LossInputs) -> Loss:
        value = logprobs_K.sum() + entropies_K.sum()
        return Loss(value, Metrics({"loss": value.detach()}, {}))

    policy = Policy(run, start_world(120, deterministic=True), total_updates=1)
    batch = policy.local_part(full_batch(run, lengths, rows))
    parameters = [parameter for module in policy.chunks for parameter in module.parameters()]
    buffers = [*chain.from_iterable(module.buffers + module.expert_parallel_buffers for module in policy.chunks)]
    gradients = [buffer.grad_data for buffer in buffers]
    measured = Measured(storage_bytes(parameters), storage_bytes(gradients))
    policy.compute_logprobs(batch)  # allocations of the first use are not activations
    meter = Meter()
    config = policy.chunks[0].config
    reduce_gradients = config.finalize_model_grads_func

    def measured_reduction(*arguments: object, **options: object) -> None:
        measured.activations = meter.read()
        reduce_gradients(*arguments, **options)
        measured.reduction = meter.read()

    config.finalize_model_grads_func = measured_reduction
    with meter.running():
        policy.forward_backward(batch, loss_fn)
    policy.optim_step()
    measured.optimizer = storage_bytes(_optimizer_tensors(policy))
    return measured


def _optimizer_tensors(policy: "Policy") -> list[Tensor]:
    from megatron_rl.policy.optimizer import optimizer_parts

    return [tensor for part in optimizer_parts(policy.optimizer).values() for tensor in part.tensors().values()]


CATEGORIES = ("parameters", "gradients", "optimizer", "activations")


def compare(case: Case) -> list[tuple[Measured, Measured]]:
    """Return (plan, measured) for every rank of a case."""
    with tempfile.TemporaryDirectory() as folder:
        run = _run_of(case, Path(folder))
        layout = layout_of(run.parallel, case.ranks)
        rows = 4 if layout.pipeline > 1 else 2
        if "RANK" in os.environ:
            measured = [measure(run, LENGTHS, rows * layout.data)]
            return [(_planned(run, rows)[int(os.environ["RANK"])], measured[0])]
        measured = run_ranks(
            _measure_words, case.ranks, run.model_dump_json(), rows * layout.data, initialize=False, timeout_seconds=280
        )
        return list(zip(_planned(run, rows), measured, strict=True))


def _measure_words(run: str, rows: int) -> Measured:
    return measure(Run.model_validate_json(run), LENGTHS, rows)


def _run_of(case: Case, folder: Path) -> Run:
    """Return the run of a case, with random weights that are written to the folder."""
    from megatron_rl.config.load import load
    from megatron_rl.prove.case import make_model

    (folder / "sizes").mkdir()
    (folder / "model").mkdir()
    (folder / "sizes" / "config.json").write_text(json.dumps(MODELS[case.model]))
    words = [*case.words, f"train.tokens_per_microbatch={sum(LENGTHS)}", "cluster.expert_imbalance=1.0"]
    words += ["task.max_operations=3", f"parallel.ranks={case.ranks}"]
    run = load(Run, [], [f"model.path={folder / 'sizes'}", *words]).run
    path = make_model(run, None, folder / "model")
    return run.model_copy(update={"model": run.model.model_copy(update={"path": path})})


def _planned(run: Run, rows: int) -> list[Measured]:
    """Return the plan for every rank, in rank order."""
    layout = layout_of(run.parallel, run.parallel.ranks)
    family = family_of(read_hf_config(Path(run.model.path)))
    work = full_microbatch(run, max(LENGTHS), fused=torch.cuda.is_available())
    work = replace(work, trained=work.tokens - len(LENGTHS))
    memories = stage_memory(run, family, layout, work, rows)
    stages = layout.ranks // layout.pipeline
    return [_as_measured(memories[rank // stages]) for rank in range(layout.ranks)]


def _as_measured(memory: RankMemory) -> Measured:
    return Measured(memory.parameters, memory.gradients, memory.optimizer, memory.activations.total, memory.reduction)


def comparison(results: Mapping[str, list[tuple[Measured, Measured]]]) -> str:
    """Return the rank of each case with the most activations as Markdown: plan / measured in MB, one value if equal."""
    rows = []
    for name, pairs in results.items():
        plan, seen = max(pairs, key=lambda pair: pair[1].activations)
        amounts = [[f"{getattr(each, c) / 1e6:.2f}" for each in (plan, seen)] for c in CATEGORIES]
        cells = [" / ".join(dict.fromkeys(pair)) for pair in amounts]
        rows.append([name, *cells, f"{plan.activations / seen.activations:.3f}"])
    return table(["case", *CATEGORIES, "plan / measured"], rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--write", type=Path, help="write the numbers here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {case.name: compare(case) for case in CASES if options.case in case.name}
    print(comparison(results))
    if options.write is not None:
        figures = {name: [[asdict(one) for one in pair] for pair in pairs] for name, pairs in results.items()}
        options.write.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
