"""What a rank holds besides its shards while the model goes out: measured, tensor by tensor."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.live_bytes import LiveBytes
from megatron_rl.config.schema import PUSH_BUFFERS
from megatron_rl.distributed.mesh import start_world
from megatron_rl.policy.engine import Policy
from megatron_rl.weights.tensor import TensorTransport
from tests.policy import families
from tests.policy.tiny import run_of
from tests.ranks import run_ranks

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread")]

BUCKET_BYTES = 192 << 10
"""Above four times the largest parameter, gate and up of a dense layer (48 KiB): no parameter is ever cut."""
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "one rank": (1, {}),
    "tensor": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "tensor and expert": (2, {"tensor": 2, "expert": 2}),
}


def peaks(folder: str, parallel: dict[str, object], way: str, bucket_bytes: int = BUCKET_BYTES) -> tuple[int, int]:
    """Return the most bytes that this rank held, and the bytes that it got."""
    run = run_of(Path(folder), parallel=parallel)
    policy = Policy(run, start_world(60, deterministic=True), total_updates=1)
    transport, seen = TensorTransport(bucket_bytes // PUSH_BUFFERS), 0
    with LiveBytes() as bytes_:
        weights = policy.weights(bucket_bytes)
        ways = {"main": weights.__iter__, "stage": weights.stage_tensors, "own": weights.owned_tensors}
        for bucket in transport.buckets(ways[way]()):
            seen += sum(tensor.nbytes for _, tensor in bucket)
            bucket.clear()
    return bytes_.peak, seen


@pytest.mark.parametrize("way", ["main", "stage", "own"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rank_holds_more_than_a_bucket_besides_its_shards(model: Path, layout: str, way: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    results = run_ranks(peaks, ranks, str(model), parallel, way, initialize=False, timeout_seconds=200)

    total = (model / "model.safetensors").stat().st_size
    assert max(peak for peak, _ in results) <= BUCKET_BYTES
    assert total / 5 > BUCKET_BYTES  # so that the whole model could not have been within the bound
    assert sum(seen for _, seen in results) == pytest.approx(total, rel=0.02)  # the file has a header too
    senders = {"main": 1, "stage": parallel.get("pipeline", 1)}.get(way)
    assert senders in (None, sum(seen > 0 for _, seen in results))
    assert way != "own" or all(seen for _, seen in results) or "tensor" in layout


@pytest.mark.parametrize("way", ["main", "stage", "own"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_that_come_in_one_tensor_cost_that_tensor_besides(tmp_path: Path, layout: str, way: str) -> None:
    """An expert's gate and up matrix (48 KiB), as two ranks have one each, is a fifth of this bucket."""
    bucket_bytes = PUSH_BUFFERS * 2 * (48 << 10)
    folder = families.save("gpt_oss", tmp_path / "hf")
    ranks, parallel = LAYOUTS[layout]
    results = run_ranks(peaks, ranks, str(folder), parallel, way, bucket_bytes, initialize=False, timeout_seconds=200)

    tensors = load_file(folder / "model.safetensors").values()
    assert max(peak for peak, _ in results) <= bucket_bytes + max(tensor.nbytes for tensor in tensors)
    assert sum(seen for _, seen in results) == sum(tensor.nbytes for tensor in tensors)
