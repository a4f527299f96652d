from pathlib import Path

import pytest

from tests.e2e.job import Job


@pytest.fixture(scope="session")
def straight(tmp_path_factory) -> Path:
    """The run folder of four steps on two ranks, tensor 2 and expert 2, that nothing disturbed."""
    folder = tmp_path_factory.mktemp("e2e") / "straight"
    with Job(folder) as job:
        assert job.end() == 0, job.output()
    return folder
