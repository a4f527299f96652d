import base64
import os
import pickle
from pathlib import Path

import pytest
import torch

from megatron_rl.inference_server.requests import BadRequest
from megatron_rl.inference_server.tensor_payload import read_tensors
from megatron_rl.weights.tensor import encode


class Executes:
    """Runs a command when it is unpickled by the ordinary unpickler."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def payload(content: object, protocol: int = 5) -> str:
    return base64.b64encode(pickle.dumps(content, protocol=protocol)).decode()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_tensors_come_through_bit_for_bit(dtype: torch.dtype) -> None:
    sent = [
        ("a", torch.randn(3, 4).to(dtype)),
        ("b.c", torch.zeros(0, dtype=dtype)),
        ("d", torch.ones((), dtype=dtype)),
    ]
    received = read_tensors(encode(sent))
    assert [name for name, _ in received] == ["a", "b.c", "d"]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for (_, a), (_, b) in zip(sent, received, strict=True))


def test_a_view_does_not_drag_its_storage_along() -> None:
    whole = torch.randn(1000, 10)
    assert len(encode([("part", whole[:1])])) < 5000
    [(_, part)] = read_tensors(encode([("part", whole[:1])]))
    assert torch.equal(part, whole[:1])


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_code_in_a_payload_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "executed"
    bomb = Executes(marker)
    for content in (bomb, [("name", bomb)], [("name", torch.ones(1)), bomb]):
        with pytest.raises(BadRequest, match="is not part of a tensor"):
            read_tensors(payload(content, protocol))
    assert not marker.exists()


def test_code_inside_a_storage_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Storage:
        def __reduce__(self) -> tuple[object, ...]:
            return torch.storage._load_from_bytes, (pickle.dumps(Executes(marker), protocol=2),)

    with pytest.raises(BadRequest):
        read_tensors(payload([("name", Storage())]))
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "torch.load", "torch._utils._rebuild_tensor", "torch.storage.torch"]
)
def test_every_other_name_is_refused(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    raw = f"c{module}\n{attribute}\n.".encode()
    with pytest.raises(BadRequest, match="is not part of a tensor"):
        read_tensors(base64.b64encode(raw).decode())


@pytest.mark.parametrize("content", [{"a": 1}, [("a", 1)], [("a", torch.ones(1), 3)], [(1, torch.ones(1))], "text"])
def test_anything_but_named_tensors_is_refused(content: object) -> None:
    with pytest.raises(BadRequest, match="it holds something else"):
        read_tensors(payload(content))


@pytest.mark.parametrize("text", ["%%%", "", "AAAA", base64.b64encode(pickle.dumps([1])[:-3]).decode()])
def test_damaged_payloads_are_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="serialized_named_tensors is not"):
        read_tensors(text)
