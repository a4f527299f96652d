"""Python's garbage collector, steered: it runs between steps, on all ranks at once, and skips the objects of startup.

A full collection of the objects of torch, transformers and megatron-core takes a quarter of a second, and by default
each rank does one at a time of its own, for which the others wait.
"""

import gc

MAX_NEW_OBJECTS = 1_000_000
"""New objects after which a collection starts by itself, in case a step makes that many."""


def freeze_startup_objects() -> None:
    """Exempt all objects that exist now from later collections, and stop collections within a step."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(MAX_NEW_OBJECTS)


def collect_garbage() -> None:
    """Collect what the last step left in reference cycles; call this between steps, at the same place on every rank."""
    gc.collect()
