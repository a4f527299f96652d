"""Each workaround for megatron-core is still needed, and only by the releases that it was measured on.

A test that fails here after an update of megatron-core reports good news (the defect is fixed: drop the workaround) or
bad news (a defect appeared). ``python benchmarks/workaround_table.py`` prints all figures.
"""

from pathlib import Path

import pytest

from megatron_rl.policy.upstream import RELEASE
from tests.policy.workarounds import DEFECTS, measured, save

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread")]

RIGHT = 1e-5
"""Errors below are float32 rounding, as in test_parity; the defects give at least 1e-3."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = sorted({defect.family for defect in DEFECTS.values()} - {""})
    return {"": Path(), **{name: save(name, tmp_path_factory.mktemp(name)) for name in names}}


@pytest.mark.parametrize("name", DEFECTS)
def test_megatron_core_is_wrong_exactly_where_this_package_works_around_it(folders, name: str) -> None:
    defect = DEFECTS[name]
    expected = ".".join(map(str, RELEASE)) in defect.wrong_in
    result = measured(defect, folders[defect.family], disabled=True)
    if name == "first_ratio":  # any difference is one too many
        assert (result != 0) == expected, result
    else:
        assert (isinstance(result, str) or result > 100 * RIGHT) == expected, result
        assert expected or (isinstance(result, float) and result < RIGHT), result
