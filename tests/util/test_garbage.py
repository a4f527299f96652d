"""The collector skips what existed at the start, and stays quiet within a step."""

import gc
from collections.abc import Iterator

import pytest

from megatron_rl.util.garbage import MAX_NEW_OBJECTS, collect_garbage, freeze_startup_objects


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


class Node:
    def __init__(self) -> None:
        self.itself = self


def test_startup_objects_are_frozen_and_new_cycles_wait_for_the_end_of_a_step() -> None:
    freeze_startup_objects()
    assert gc.get_freeze_count() > 10_000
    assert gc.get_threshold()[0] == MAX_NEW_OBJECTS
    collect_garbage()
    found = [Node() for _ in range(5000)]
    found.clear()
    assert sum(isinstance(entry, Node) for entry in gc.get_objects()) == 5000
    collect_garbage()
    assert not any(isinstance(entry, Node) for entry in gc.get_objects())
