"""The mistakes of ``benchmarks/mutations.py`` fit the code, and planting one makes a check fail."""

import ast

import pytest

from benchmarks.mutations import ROOT, run_check
from tests.mutations.mistakes import MISTAKES


def test_every_mistake_fits_its_module_once_and_leaves_it_valid():
    misfits = []
    for mistake in MISTAKES:
        source = (ROOT / "megatron_rl" / f"{mistake.module.replace('.', '/')}.py").read_text()
        if source.count(mistake.right) != 1:
            misfits.append(
                f"{mistake.name}: {mistake.module} has {mistake.right!r} {source.count(mistake.right)} times"
            )
        ast.parse(source.replace(mistake.right, mistake.wrong))
    assert misfits == []


def test_the_tests_that_must_detect_mistakes_exist():
    checks = {check for mistake in MISTAKES for check in mistake.checks if not check.startswith("prove ")}
    files = {check.partition("::")[0] for check in checks}
    nodes = [(file, node) for file in files for node in ast.walk(ast.parse((ROOT / file).read_text()))]
    tests = {f"{file}::{node.name}" for file, node in nodes if isinstance(node, ast.FunctionDef)}
    assert checks - tests == set()


def test_names_are_unique():
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)


@pytest.mark.processes
def test_a_check_fails_with_a_mistake_planted():
    """``benchmarks/mutations.py`` itself shows that all checks pass without a mistake."""
    result = run_check("tests/test_policy_loss.py::test_bounds_are_inclusive", "clip-bounds-exclusive")
    assert (result.passed, result.failed) == (False, True)
    assert "test_bounds_are_inclusive" in result.message
