"""Boxes: the rows and columns of a Hugging Face tensor that a rank holds, and where it holds them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from megatron_rl.models.hf_mapping.rules import Shape

Span = tuple[int, int]
"""First index, and the index after the last."""
Piece = tuple[Span, Span, int, int]
"""Rows and columns of a Hugging Face tensor, and the row and column of the parameter where they begin."""


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """Return the shape of a tensor as a matrix: a vector is one column, further dimensions are columns."""
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True)
class Box:
    """A rectangle of a tensor that lies in a parameter of some ranks.

    Attributes:
        rows, columns: of the Hugging Face tensor, as a matrix.
        parameter: name of the parameter that holds it.
        row, column: position of the first element in the parameter, as a matrix.
        ranks: the ranks that hold it.
    """

    rows: Span
    columns: Span
    parameter: str
    row: int
    column: int
    ranks: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])

    def cut(self, rows: Span, columns: Span) -> "Box":
        """Return the part with these rows and columns of the tensor."""
        row, column = self.row + rows[0] - self.rows[0], self.column + columns[0] - self.columns[0]
        return replace(self, rows=rows, columns=columns, row=row, column=column)

    def strips(self, count: int) -> Iterator["Box"]:
        """Yield the box in so many parts of about equal numbers of rows, or of columns if it has too few rows."""
        (start, stop), (left, right) = self.rows, self.columns
        by_rows = stop - start >= count or stop - start >= right - left
        first, length = (start, stop - start) if by_rows else (left, right - left)
        count = min(count, length)
        bounds = [first + length * i // count for i in range(count + 1)]
        for span in pairwise(bounds):
            yield self.cut(span, self.columns) if by_rows else self.cut(self.rows, span)


def common(one: Span, other: Span) -> Span | None:
    """Return the indices in both spans; None if there are none."""
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else None
