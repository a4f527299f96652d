"""Every objective as a policy loss of the real verl: through its registry and its `ppo_loss`.

MEGATRON_RL_PEERS is the folder that `tools/peer-env` made; without it the test is skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_rl.algorithms.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parents[2]
PEERS = os.environ.get("MEGATRON_RL_PEERS")
BOUND = 1e-14
"""float64; only the order of a few dozen additions of order 1 differs."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.skipif(PEERS is None, reason="set MEGATRON_RL_PEERS to the folder of tools/peer-env"),
]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float | str]]:
    command = [f"{PEERS}/bin/python", str(ROOT / "tests" / "peers" / "in_verl.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def failures(results: dict[str, float | str]) -> dict[str, float | str]:
    return {name: gap for name, gap in results.items() if isinstance(gap, str) or gap > BOUND}


def test_losses_of_the_registry_are_policy_loss(found):
    assert set(found["registry"]) == set(OBJECTIVES)
    assert failures(found["registry"]) == {}


def test_micro_batches_of_two_ranks_in_ppo_loss_are_policy_loss(found):
    """bapo needs a sum over the whole mini-batch, which verl does not make."""
    assert set(found["ppo_loss"]) == set(OBJECTIVES)
    assert set(failures(found["ppo_loss"])) == {"bapo"}
    assert "sum over the whole mini-batch" in str(found["ppo_loss"]["bapo"])


def test_with_bypass_objectives_against_the_engine_need_nothing_else(found):
    """What still needs more: entropies, segment ids, or the sum of bapo."""
    assert set(failures(found["bypass"])) == {"aspo", "bapo", "espo", "sspo"}
    assert all(isinstance(message, str) for message in failures(found["bypass"]).values())
