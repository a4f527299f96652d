"""transformer-engine's layer spec of every family, built on a CPU: names, shapes, marks and bytes as in the tables."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_rl.distributed.collectives import group_rank, group_size
from megatron_rl.distributed.mesh import Mesh, start_world
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.policy.hf_weights import LocalParam, WeightExport, load_weights, mark_shards, shards_of, tied_copies
from megatron_rl.policy.model import build_chunks
from megatron_rl.policy.process_groups import build_mesh
from megatron_rl.policy.upstream import repair
from tests.policy import families
from tests.policy.families import MIXTURES
from tests.policy.tiny import run_of
from tests.ranks import run_ranks
from tests.te.layouts import BUILT_CASES, LAYOUTS, parallel_of

pytestmark = [pytest.mark.te, pytest.mark.processes, pytest.mark.usefixtures("one_thread")]

UNMARKED = "core_attention.softmax_offset"
"""Sharded, but not marked by megatron-core 0.19.2: without ``mark_shards``, gradient norms would miss a part of it."""


@dataclass(frozen=True)
class Built:
    """What one rank found.

    Attributes:
        names: table entries with a parameter on this rank.
        disagreements: parameters whose shape or marks do not fit the table.
        kinds: classes of the model's modules.
        exported: the exported checkpoint, on rank 0.
    """

    names: set[str]
    disagreements: list[str]
    kinds: set[str]
    exported: dict[str, Tensor]


def build(folder: str, parallel: dict[str, object]) -> Built:
    from tests.te import doubles  # imports transformer-engine, which other environments lack

    doubles.install()
    repair()
    run = run_of(Path(folder), parallel=parallel, model={"dtype": "bfloat16"})
    family = family_of(read_hf_config(Path(folder)))
    mesh = build_mesh(run, start_world(60, deterministic=True))
    chunks = build_chunks(run, family, mesh)
    shards = shards_of(chunks, family, mesh)
    copies = tied_copies(chunks, family)
    disagreements = [
        text for shard in [*shards, *copies] for text in disagreements_of(shard, mesh, run.parallel.sequence_parallel)
    ]
    mark_shards(shards, mesh)
    load_weights(chunks, family, mesh, Path(folder))
    exported = {name: tensor.clone() for name, tensor in WeightExport(shards, mesh, 1 << 20)}
    dist.barrier()
    modules: list[nn.Module] = [module for chunk in unwrap_model(chunks) for module in chunk.modules()]
    kinds = {type(module).__name__ for module in modules}
    return Built({shard.full_name for shard in shards}, disagreements, kinds, exported)


def disagreements_of(shard: LocalParam, mesh: Mesh, is_sequence_parallel: bool) -> list[str]:
    """Compare a parameter's shape and the marks that its layer set for gradients with its table entry."""
    group, rule = shard.group(mesh), shard.name.rule
    whole = [torch.empty(shape, device="meta") for shape in shard.name.shapes]
    expected = rule.shard(whole, group_rank(group), group_size(group)).shape
    found = []
    if shard.parameter.shape != expected:
        found.append(f"{shard.full_name}: shape {tuple(shard.parameter.shape)}, the table has {tuple(expected)}")
    if group_size(group) > 1 and shard.is_trained:
        sharded = getattr(shard.parameter, "tensor_model_parallel", False)
        dim = getattr(shard.parameter, "partition_dim", None) if sharded else None
        if dim != rule.dim and not shard.full_name.endswith(UNMARKED):
            found.append(f"{shard.full_name}: sharded along {dim}, the table has {rule.dim}")
        # Without sequence parallelism, every rank computes the whole gradient of a replicated parameter.
        if rule.dim is None and getattr(shard.parameter, "sequence_parallel", False) != is_sequence_parallel:
            found.append(f"{shard.full_name}: its mark for a sum over tensor ranks is {not is_sequence_parallel}")
    return found


@pytest.mark.parametrize(("name", "layout"), BUILT_CASES)
def test_the_spec_has_the_parameters_of_the_table(tmp_path: Path, monkeypatch, name: str, layout: str) -> None:
    monkeypatch.setenv("MEGATRON_RL_DEVICE", "cpu")  # after the stand-ins, torch reports a CUDA device
    families.save(name, tmp_path, torch.bfloat16)
    ranks = LAYOUTS[layout].ranks

    built = run_ranks(build, ranks, str(tmp_path), parallel_of(name, layout), initialize=False, timeout_seconds=280)

    assert [text for rank in built for text in rank.disagreements] == []
    family = family_of(read_hf_config(tmp_path))
    table = {mapping.megatron_name(layer, expert) for mapping, layer, expert in family.parameters()}
    assert set().union(*(rank.names for rank in built)) == table
    assert {"TERowParallelLinear", "TEDotProductAttention"} <= built[0].kinds
    assert ("TEColumnParallelGroupedLinear" in built[-1].kinds) == (name in MIXTURES)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert built[0].exported.keys() == on_disk.keys()
    assert [key for key, tensor in on_disk.items() if not torch.equal(built[0].exported[key], tensor)] == []
