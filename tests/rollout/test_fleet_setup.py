"""Which weight transport ``auto`` chooses: shared memory only for servers that this process started."""

from typing import Any

import pytest

from megatron_rl.config.schema import Run
from megatron_rl.rollout import fleet_setup

URLS = {"urls": ("http://127.0.0.1:1",)}


@pytest.mark.parametrize(
    ("rollout", "on_gpus", "shares", "expected"),
    [
        ({}, False, True, "ipc"),
        ({}, False, False, "tensor"),
        ({}, True, True, "tensor"),
        (URLS, False, True, "tensor"),
        ({"registry": "somewhere"}, False, True, "tensor"),
        ({"engine": "sglang", **URLS}, False, True, "tensor"),
        ({"engine": "sglang", **URLS}, True, True, "distributed"),
        ({"engine": "vllm", **URLS}, False, True, "disk"),
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch, rollout: dict[str, Any], on_gpus: bool, shares: bool, expected: str
) -> None:
    monkeypatch.setattr(fleet_setup, "can_share_memory", lambda: shares)
    run = Run.model_validate({"model": {"path": "m"}, "rollout": rollout})
    assert fleet_setup.transport_name(run, on_gpus=on_gpus) == expected
    asked = Run.model_validate({"model": {"path": "m"}, "rollout": rollout, "weights": {"carrier": "disk"}})
    assert fleet_setup.transport_name(asked, on_gpus=on_gpus) == "disk"
