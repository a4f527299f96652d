"""The pages that are made from the code say what the code says."""

import importlib.util
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("maker", ROOT / "tools" / "make_config_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "made_by"), [("config.md", "config_page"), ("run-folder.md", "folder_page")])
def test_a_page_is_up_to_date(maker, page, made_by):
    told = "run tools/make_config_reference.py"
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == getattr(maker, made_by)(), told


def test_every_setting_has_a_meaning(maker):
    rows = [line for line in maker.config_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert [row for row in rows if row.endswith("|  |") and "`name`" not in row] == []


def test_the_readme_quotes_the_loop_as_it_is():
    loop = (ROOT / "megatron_rl" / "train" / "loop.py").read_text()
    body = textwrap.dedent(loop[loop.index("    for step in range") : loop.index("    return run.train.steps")]).strip()
    assert f"```python\n{body}\n```" in (ROOT / "README.md").read_text()
