"""The mistakes of ``benchmarks/mutations.py`` fit the code of today, and planting one changes what a check says."""

import ast

import pytest

from benchmarks.mutations import ROOT, run_check
from tests.mutations.mistakes import MISTAKES


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_fits_its_module_and_its_checks_exist(mistake):
    file = ROOT / "megatron_rl" / f"{mistake.module.replace('.', '/')}.py"
    source = file.read_text()
    assert source.count(mistake.right) == 1
    ast.parse(source.replace(mistake.right, mistake.wrong))
    for check in mistake.checks:
        if not check.startswith("prove "):
            test_file, _, function = check.partition("::")
            assert f"def {function}(" in (ROOT / test_file).read_text()


def test_names_are_unique():
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)


def test_a_check_fails_with_a_mistake_planted():
    """The benchmark itself shows that all pass without one; to do so here as well would take twice as long."""
    result = run_check("tests/test_policy_loss.py::test_bounds_are_inclusive", "clip-bounds-exclusive")
    assert (result.passed, result.failed) == (False, True)
    assert "test_bounds_are_inclusive" in result.message
