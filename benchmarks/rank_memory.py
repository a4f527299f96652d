"""Memory per rank and serial time between phases: python benchmarks/rank_memory.py [--tokens 4000000] [--ranks 1 2 4]

A step of a fixed number of tokens with routing replay's columns goes to 1, 2 and 4 data-parallel ranks, through the
code of a run: outline, packing, ``TokenDistribution``, ``prepare`` and the records of the step, without a model.
Columns that a policy computes are random. Rank 0 has the whole step until ``fetch``, so its peak is shown apart.

* columns: bytes of the own columns, of the fullest rank other than rank 0.
* peak: growth of the peak resident set over the step (VmHWM minus VmRSS before), of the same ranks.
* serial: processor time of rank 0 between the phases, per million tokens of the whole step: split, packing,
  ``prepare``, metrics and mismatch report. The transfer of the columns is shown apart.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.common import run_on_ranks, table

if TYPE_CHECKING:
    from megatron_rl.config.schema import Run
    from megatron_rl.data.types import Batch
    from megatron_rl.distributed.mesh import Mesh
    from megatron_rl.rollout.distribution import TokenDistribution

LENGTH, LAYERS, EXPERTS_PER_TOKEN, GROUP, UPDATES = 2048, 16, 8, 16, 4


def status_bytes(key: str) -> int:
    """Return an entry of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def rank(out: Path, tokens: int) -> None:
    """Run a small step, then the measured one on this rank, and write its numbers."""
    import torch.distributed as dist

    from megatron_rl.config.load import load
    from megatron_rl.config.schema import Run
    from megatron_rl.distributed.mesh import start_world
    from megatron_rl.policy.process_groups import build_mesh
    from megatron_rl.rollout.distribution import TokenDistribution

    run = load(Run, [], ["model.path=x"]).run
    mesh = build_mesh(run, start_world(600, deterministic=True))
    distribution = TokenDistribution(mesh, range(LAYERS))
    one_step(run, mesh, distribution, 40 * LENGTH * GROUP)  # what the first use of code and connections takes
    numbers = one_step(run, mesh, distribution, tokens)
    Path(f"{out}.{mesh.world.rank}").write_text(json.dumps(numbers))
    dist.destroy_process_group()


def one_step(run: "Run", mesh: "Mesh", distribution: "TokenDistribution", tokens: int) -> dict[str, float]:
    """Return own tokens, bytes of columns, growth of the peak and processor seconds of a step on this rank."""
    import torch.distributed as dist

    from megatron_rl.algorithms.loss import prepare
    from megatron_rl.algorithms.objectives import GSPO
    from megatron_rl.data.minibatch import MinibatchPlan
    from megatron_rl.data.pack import RowRules, pack
    from megatron_rl.data.types import Batch
    from megatron_rl.distributed.collectives import broadcast_tensors
    from megatron_rl.distributed.replicas import CPU
    from megatron_rl.observability.mismatch_causes import LogprobGaps, MismatchSettings, diagnose
    from megatron_rl.observability.mismatch_report import worst_samples, worst_tokens
    from megatron_rl.observability.step_metrics import StepMetrics, entropy_parts
    from megatron_rl.rollout.distribution import columns_of, schema_of

    world = mesh.world
    step = _step(tokens) if world.is_main else None
    dist.barrier()
    resident = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    clock = {"serial": 0.0, "transfer": 0.0}

    began = time.process_time()
    metrics = StepMetrics()
    outline = None if step is None else step.outline()
    sent = None if outline is None else {"lengths_B": outline.lengths_B, **outline.columns}
    columns = broadcast_tensors(sent, 0, CPU)
    assert columns is not None
    outline = Batch(columns.pop("lengths_B"), columns)
    metrics.rollout(0, outline, {})
    rules = RowRules(8 * LENGTH, count_multiple=world.size)
    parts = outline.split(UPDATES, seed=(0, 0))
    plans = [MinibatchPlan(part, pack(part.lengths_B, rules), world.rank, world.size) for part in parts]
    clock["serial"] += time.process_time() - began

    began = time.process_time()
    read = None if step is None else columns_of(step)
    minibatches = distribution.fetch(plans, read, None if step is None else schema_of(step.columns))
    step = read = None
    clock["transfer"] = time.process_time() - began

    for number, minibatch in enumerate(minibatches):  # the policy's part, not counted
        noise_T = 0.01 * torch.rand(len(minibatch["loss_mask_T"]))
        old = {"old_logprobs_T": minibatch["rollout_logprobs_T"] + noise_T, "old_entropies_T": noise_T}
        minibatches[number] = minibatch.add(old)
    held = [c for m in minibatches for name, c in m.columns.items() if name.endswith("_T")]

    began = time.process_time()
    gaps = LogprobGaps.of(minibatches, mesh.replicas)
    metrics.logprobs(entropy_parts(minibatches, mesh.replicas), gaps.statistics, None)
    diagnose(gaps, 0, MismatchSettings.of(run))
    mesh.replicas.gather([worst_tokens(minibatches), worst_samples(minibatches)])
    for minibatch in minibatches:
        prepare(minibatch, GSPO(), total=mesh.replicas.sum)
    clock["serial"] += time.process_time() - began

    return {
        "own": sum(int(minibatch.lengths_B.sum()) for minibatch in minibatches),
        "held": sum(column.untyped_storage().nbytes() for column in held),
        "peak": status_bytes("VmHWM") - resident,
        **clock,
    }


def _step(tokens: int) -> "Batch":
    """Return the batch of a step with random columns, prompts of an eighth of each sequence."""
    from megatron_rl.data.types import Batch

    generator = torch.Generator().manual_seed(0)
    count = tokens // LENGTH // GROUP * GROUP
    lengths_B = torch.randint(LENGTH // 2, 3 * LENGTH // 2, (count,), generator=generator)
    total = int(lengths_B.sum())
    place_T = torch.arange(total) - torch.repeat_interleave(lengths_B.cumsum(0) - lengths_B, lengths_B)
    rewards_B = torch.randint(0, 2, (count,), generator=generator).double()
    shape = (total, LAYERS, EXPERTS_PER_TOKEN)
    columns = {
        "input_ids_T": torch.randint(0, 1000, (total,), generator=generator),
        "loss_mask_T": place_T >= LENGTH // 8,
        "rollout_logprobs_T": -torch.rand(total, generator=generator),
        "weight_versions_T": torch.zeros(total, dtype=torch.int64),
        "rollout_routes_T": torch.zeros(shape, dtype=torch.uint8),
        "rollout_routed_T": torch.ones(total, dtype=torch.bool),
        "sample_index_B": torch.arange(count),
        "rewards_B": rewards_B,
        "verified_B": torch.ones(count, dtype=torch.bool),
        "truncated_B": torch.zeros(count, dtype=torch.bool),
        "group_ids_B": torch.arange(count) // GROUP,
        "advantages_B": rewards_B - 0.5,
    }
    return Batch(lengths_B, columns)


def main() -> None:
    """Run every number of ranks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank(arguments.rank, arguments.tokens)
        return
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in arguments.ranks:
            out = Path(folder, str(ranks))
            run_on_ranks(__file__, ranks, [str(out), "--tokens", str(arguments.tokens)])
            found = [json.loads(Path(f"{out}.{number}").read_text()) for number in range(ranks)]
            first, others = found[0], found[1:] or found
            million = sum(each["own"] for each in found) / 1e6
            rows.append(
                [
                    str(ranks),
                    f"{max(each['held'] for each in others) / 2**20:.0f}",
                    f"{max(each['peak'] for each in others) / 2**20:.0f}",
                    f"{first['peak'] / 2**20:.0f}",
                    f"{first['serial'] / million:.3f}",
                    f"{first['transfer'] / million:.3f}",
                ]
            )
    heads = ["ranks", "columns, MiB", "peak, MiB", "rank 0, MiB", "serial, s per M tokens", "transfer, s per M tokens"]
    print(table(heads, rows))


if __name__ == "__main__":
    main()
