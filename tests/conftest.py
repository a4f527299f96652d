"""For all tests: no property test fails because the machine is slow; tests that fork ranks start no threads before."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("house", deadline=None)
settings.load_profile("house")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keep torch from starting threads in this process: forked ranks would not have them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
