"""What ``train.deterministic`` sets on a rank before anything runs there."""

import os

import pytest
import torch

from megatron_rl.distributed.mesh import DETERMINISTIC_ENVIRONMENT, is_deterministic, start_world
from tests.ranks import run_ranks

pytestmark = pytest.mark.processes


def started(deterministic: bool, given: dict[str, str]) -> dict[str, object]:
    for name in DETERMINISTIC_ENVIRONMENT:
        os.environ.pop(name, None)
    os.environ.update(given)
    start_world(30, deterministic=deterministic)
    found = {name: os.environ.get(name) for name in DETERMINISTIC_ENVIRONMENT}
    return {**found, "enabled": torch.are_deterministic_algorithms_enabled()}


@pytest.mark.parametrize("deterministic", [True, False])
def test_libraries_are_told_before_they_start(deterministic: bool) -> None:
    found = run_ranks(started, 1, deterministic, {}, initialize=False)[0]
    expected = DETERMINISTIC_ENVIRONMENT if deterministic else dict.fromkeys(DETERMINISTIC_ENVIRONMENT)
    assert found == {**expected, "enabled": deterministic}


def test_what_somebody_set_stays() -> None:
    found = run_ranks(started, 1, True, {"NCCL_ALGO": "Ring"}, initialize=False)[0]
    assert found["NCCL_ALGO"] == "Ring"


@pytest.mark.parametrize(
    ("setting", "on_gpus", "expected"), [(None, False, True), (None, True, False), (True, True, True)]
)
def test_the_default_is_deterministic_on_cpus_only(setting: bool | None, on_gpus: bool, expected: bool) -> None:
    assert is_deterministic(setting, on_gpus=on_gpus) is expected
