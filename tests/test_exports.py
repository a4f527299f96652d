import subprocess
import sys

import pytest

import megatron_rl


def test_every_public_name_can_be_imported():
    for name in megatron_rl.__all__:
        assert getattr(megatron_rl, name) is not None
    with pytest.raises(AttributeError, match="polcy_loss"):
        megatron_rl.polcy_loss  # noqa: B018


@pytest.mark.processes
def test_importing_the_package_is_cheap_and_its_functions_do_without_megatron():
    program = (
        "import sys, megatron_rl; assert 'torch' not in sys.modules;"
        "megatron_rl.policy_loss; assert not any(name.split('.')[0] == 'megatron' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
