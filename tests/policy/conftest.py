"""For the tests of the policy: the tiny model's folder."""

from pathlib import Path

import pytest

from tests.policy.tiny import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny model."""
    return save_model(tmp_path_factory.mktemp("model"))
