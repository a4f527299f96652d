"""``megatron-rl prove`` on transformer-engine's layers, on a CPU: every layout against one rank in float64.

The reference runs on megatron-core's local layers; the layouts run on transformer-engine's, whose kernels are the
stand-ins of ``doubles``.
"""

import json
from pathlib import Path

import pytest
import torch

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.distributed import mesh
from megatron_rl.prove import main as prove_main
from megatron_rl.prove.layouts import DEFAULT
from megatron_rl.prove.main import prove
from tests.policy import families
from tests.ranks import run_ranks
from tests.te.layouts import BIASED_EXPERTS, MORE_FAMILIES

pytestmark = [
    pytest.mark.te,
    pytest.mark.processes,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.timeout(1800),  # about 35 layouts of one to four ranks, 5 s each
]
DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.toml"
OBJECTIVES = ("grpo", "sspo", "espo")


def engine_rank(folder: str) -> int:
    """Run one rank of a layout on transformer-engine's layers; return how often a linear layer ran."""
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

    from megatron_rl.prove.rank import main
    from tests.te import doubles  # imports transformer-engine, which other environments lack

    doubles.install()
    forward = TERowParallelLinear.forward
    calls: list[object] = []

    def counted(*args: object) -> object:
        calls.append(None)
        return forward(*args)

    monkeypatch = pytest.MonkeyPatch()  # of this process, which ends after the layout
    monkeypatch.setattr(TERowParallelLinear, "forward", counted)
    # As on a GPU: transformer-engine's attention with sinks is not deterministic.
    monkeypatch.setattr(mesh, "is_deterministic", lambda setting, on_gpus: False)
    main(Path(folder))
    return len(calls)


def local_rank(folder: str) -> int:
    """Run the reference on megatron-core's local layers in float64, which transformer-engine's optimizer lacks."""
    import megatron.core.optimizer as upstream

    from megatron_rl.prove.rank import main
    from tests.te import doubles, optimizer_kernels

    for name, function in optimizer_kernels.FUNCTIONS.items():
        doubles.replace_everywhere(name, function)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(upstream, "Adam", torch.optim.AdamW)
    monkeypatch.setattr(upstream, "USING_PYTORCH_OPTIMIZER", True)
    main(Path(folder))
    return 1


def layouts_of(name: str) -> list[str]:
    """Return the default layouts, with whole experts and enough key heads where the family's layers need them."""
    if name not in BIASED_EXPERTS:
        return [*DEFAULT]
    fitting = [each for each in DEFAULT if "expert_tensor" not in each and "context=4" not in each]
    fitting = [each for each in fitting if not {"tensor=2", "context=2"} <= {*each.split(",")}]
    return [f"{each},expert_tensor=1" if "tensor=2" in each else each for each in fitting]


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_every_layout_has_the_step_of_one_rank_in_float64(tmp_path: Path, monkeypatch, name: str) -> None:
    model = families.save(name, tmp_path / "model")

    def run(folder: Path, count: int, layout: str) -> None:
        rank = local_rank if folder.name == "reference" else engine_rank
        assert all(run_ranks(rank, count, str(folder), initialize=False, timeout_seconds=280))

    monkeypatch.setenv("MEGATRON_RL_DEVICE", "cpu")  # after the stand-ins, torch reports a CUDA device
    monkeypatch.setattr(prove_main, "run_forked", run)
    monkeypatch.setattr(prove_main, "DEFAULT", layouts_of(name))
    output = tmp_path / "results.json"

    code = prove(load(Run, [DEMO], [f"model.path={model}"]), layouts=(), objectives=OBJECTIVES, output=output)

    results = json.loads(output.read_text(encoding="utf-8"))["results"]
    worst = {key: max(result[key] for result in results) for key in ("logprobs", "loss", "gradient")}
    print(f"{name}: {len(results)} results; largest differences " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
    assert {result["layout"] for result in results} >= {"expert=2", "context=2", "pipeline=2,tokens=128"}
    assert [(r["layout"], r["objective"], r["reasons"]) for r in results if not r["holds"]] == []
    assert code == 0
