import pytest
import torch

from megatron_rl.weights.checksum import sums64

_MASK = (1 << 64) - 1


def plain(raw: bytes) -> str:
    """Compute the sum word by word with Python's integers."""
    whole = len(raw) // 8 * 8
    total = int.from_bytes(raw[whole:].ljust(8, b"\0"), "little") + len(raw)
    words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, whole, 8)]
    for start in range(0, len(words), 1 << 16):
        run = words[start : start + (1 << 16)]
        weighted = sum(word * (1 + 0x3C6EF372FE94F82A * i) for i, word in enumerate(run))
        total = (total * -0x40A7B892E31B1A47 + weighted) & _MASK
    return f"{total & _MASK:016x}"


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0,), (8,), (5, 7), (1 << 18,), (70_001, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_sum_is_the_one_of_plain_integers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape, dtype=torch.float64).to(dtype)
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    other = torch.zeros_like(tensor)
    others = plain(bytes(len(raw)))
    assert sums64({"a": tensor, "b": other, "c": tensor}) == {"a": plain(raw), "b": others, "c": plain(raw)}
    assert sums64({"a": tensor}) == {"a": plain(raw)}


def test_damage_changes_it() -> None:
    tensor = torch.randn(1 << 19)
    swapped, stale, shifted = tensor.clone(), tensor.clone(), tensor.roll(1)
    swapped[[3, 300_000]] = tensor[[300_000, 3]]
    stale[1 << 18 :] = 0
    found = sums64({"a": tensor, "b": swapped, "c": stale, "d": shifted, "e": tensor[:-1], "f": -tensor})
    assert len(set(found.values())) == 6


def test_a_part_at_an_odd_place_has_the_sum_of_its_copy() -> None:
    tensor = torch.randn(40).bfloat16()
    assert sums64({"a": tensor[3:20]}) == sums64({"a": tensor[3:20].clone()})
    assert sums64({}) == {}
