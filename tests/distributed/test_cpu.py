"""The replacements of distributed.cpu: their targets exist, and they are refused on machines with a GPU."""

import pytest
import torch

from megatron_rl.distributed import cpu
from megatron_rl.errors import ConfigError


def test_every_replaced_symbol_still_exists() -> None:
    assert cpu.missing_targets() == []


def test_every_replacement_says_why() -> None:
    assert all(replacement.reason for replacement in cpu.REPLACEMENTS)


def test_refused_where_cuda_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_is_active", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    with pytest.raises(ConfigError, match="CUDA is available"):
        cpu.activate()


def test_a_moved_symbol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = cpu.Replacement("torch.cuda:no_such_function", "test", None)
    monkeypatch.setattr(cpu, "REPLACEMENTS", (*cpu.REPLACEMENTS, gone))

    assert cpu.missing_targets() == ["torch.cuda:no_such_function"]
