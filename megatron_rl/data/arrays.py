"""Equality of dataclasses that have numpy arrays as fields, without torch."""

from dataclasses import fields
from typing import Any

import numpy as np


class ArrayEquality:
    """Base of dataclasses with ``eq=False``: two are equal if their compared fields are, arrays by value."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        instance: Any = self
        return all(_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(instance) if f.compare)

    __hash__ = None  # type: ignore[assignment]


def _equal(first: object, second: object) -> bool:
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return np.array_equal(first, second)
    return first == second
