"""The table of errors in docs/objectives.md: complete, and what it promises holds in float32 and in float64."""

import pytest
import torch

from benchmarks.oracle_table import END, PAGE, START, batch_of, errors
from tests.oracle.objectives import CASES

BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6}
"""Sums of up to a thousand terms of order 1, each rounded to 1e-16 or 6e-8; LUSPO's terms are of the order of 10."""


def test_the_table_has_every_case_within_the_bounds():
    text = PAGE.read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.split(START)[1].split(END)[0].splitlines()]
    rows = {cells[0]: [float(cell) for cell in cells[1:]] for cells in lines if cells[0] in CASES}
    assert list(rows) == list(CASES)
    assert {name: row for name, row in rows.items() if max(row[:2]) > BOUNDS[torch.float64]} == {}
    assert {name: row for name, row in rows.items() if max(row[2:]) > BOUNDS[torch.float32]} == {}


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_an_objective_is_its_formula_in_both_precisions(name, precision):
    for spread in (1e-3, 0.3):
        assert max(errors(CASES[name], batch_of(123, spread), precision)) <= BOUNDS[precision]
