"""The rules of the house, one test per rule; a failure lists every offender.

A limit may shrink; raising one is a decision that a review discusses.
"""

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import megatron_rl
from megatron_rl.cli.verbs import VERBS as PARSED_VERBS
from megatron_rl.config.schema import Run
from megatron_rl.config.tree import all_fields

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megatron_rl"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_LOOP_LINES = 120
MAX_CONFIG_FIELDS = 226
VERBS = [
    "check",
    "completion",
    "configs",
    "convert",
    "debug-nonfinite",
    "eval",
    "init",
    "prove",
    "report",
    "serve",
    "slurm",
    "train",
]

DEVICE_STAND_INS = "distributed/cpu.py"
"""Replaces ``torch.cuda`` on machines without a GPU, so it alone may name the device."""

AVOIDED_WORDS = {"ahead", "apart", "beside", "besides", "given", "kept", "own", "said", "told", "wanted"}
"""Adverbs and participles that are not identifiers: not alone, nor as the first or last word of one."""


@dataclass(frozen=True)
class Module:
    """A parsed file of the package."""

    name: str
    text: str
    tree: ast.Module

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))


def parse(file: Path) -> Module:
    text = file.read_text()
    return Module(str(file.relative_to(PACKAGE)), text, ast.parse(text))


MODULES = [parse(file) for file in sorted(PACKAGE.rglob("*.py"))]


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield ``file:line`` and the text of every docstring, those under fields and constants included."""
    for module in MODULES:
        for node in module.nodes(ast.Expr):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield f"{module.name}:{node.lineno}", node.value.value.strip()


def test_files_are_short():
    lengths = {module.name: len(module.text.splitlines()) for module in MODULES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_short():
    offenders = {
        f"{module.name}:{node.lineno} {node.name}": length
        for module in MODULES
        for node in module.nodes(ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert offenders == {}


def test_no_device_is_named():
    pattern = re.compile(r'\.cuda\(|device="cuda"')
    assert [m.name for m in MODULES if pattern.search(m.text) and m.name != DEVICE_STAND_INS] == []


def test_no_exception_is_swallowed():
    offenders = [
        f"{module.name}:{node.lineno}"
        for module in MODULES
        for node in module.nodes(ast.ExceptHandler)
        if isinstance(node, ast.ExceptHandler)
        and not isinstance(node.body[-1], ast.Raise)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    ]
    assert offenders == []


def test_sources_are_ascii():
    assert [module.name for module in MODULES if not module.text.isascii()] == []


def test_todos_name_an_issue():
    pattern = re.compile(r"\b(TODO|FIXME|XXX)\b(?!.*#\d+)")
    assert [module.name for module in MODULES if pattern.search(module.text)] == []


def test_class_names_are_unique():
    files = defaultdict(list)
    for module in MODULES:
        for node in module.nodes(ast.ClassDef):
            if isinstance(node, ast.ClassDef):
                files[node.name].append(module.name)
    assert {name: places for name, places in files.items() if len(places) > 1} == {}


def test_docstrings_can_be_understood_alone():
    offenders = [
        f"{place}: {text.splitlines()[0]}"
        for place, text in docstrings()
        if text.startswith(("Of ", "See ", "Between ", "By "))
        or not re.search(r"[a-z]{2}", re.sub(r"``.*?``", "", text))
    ]
    assert offenders == []


def identifiers(module: Module) -> Iterator[str]:
    """Yield the names of variables, arguments, attributes, functions and classes."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name


def test_identifiers_are_no_adverbs_or_participles():
    offenders = set()
    for module in MODULES:
        for name in identifiers(module):
            words = re.sub(r"_[A-Z0-9]+$", "", name).strip("_").lower().split("_")
            if {words[0], words[-1]} & AVOIDED_WORDS:
                offenders.add(f"{module.name}: {name}")
    assert sorted(offenders) == []


def test_spelling_is_american():
    pattern = re.compile(
        r"(initiali|optimi|normali|seriali|organi|recogni|materiali)s(e|ed|er|es|ing|ation)\b|colour", re.I
    )
    offenders = [
        f"{module.name}:{number}: {found[0]}"
        for module in MODULES
        for number, line in enumerate(module.text.splitlines(), 1)
        if (found := pattern.search(line))
    ]
    assert offenders == []


@pytest.mark.parametrize("name", ["train/loop.py", "algorithms/loss.py"])
def test_the_loop_and_the_loss_name_no_objective(name):
    code = (PACKAGE / name).read_text().lower()
    files = (PACKAGE / "algorithms" / "objectives").glob("*.py")
    objectives = [file.stem for file in files if file.stem not in ("__init__", "base")]
    assert [objective for objective in objectives if re.search(rf"\b{objective}\b", code)] == []


def test_the_loop_is_one_screen():
    assert len((PACKAGE / "train" / "loop.py").read_text().splitlines()) <= MAX_LOOP_LINES


def test_the_configuration_does_not_grow_by_accident():
    assert len({key for key, _, _ in all_fields(Run)}) <= MAX_CONFIG_FIELDS


def test_the_command_line_has_only_verbs_that_exist():
    assert sorted(PARSED_VERBS) == VERBS


def test_everything_exported_at_the_top_exists():
    assert [name for name in megatron_rl.__all__ if not hasattr(megatron_rl, name)] == []


@pytest.mark.parametrize("name", ["python3.11.txt", "python3.12.txt"])
def test_the_locks_pin_every_requirement_with_a_hash(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *extras["dev"], *extras["docs"], *extras["tasks"]]
    lock = (ROOT / "locks" / name).read_text()
    pinned = dict(re.findall(r"^([\w-]+)==(\S+).*\\\n +--hash=sha256:", lock, re.MULTILINE))
    names = {re.split(r"[\[<>=]", requirement)[0].lower() for requirement in required}
    assert names - {"torch", "megatron-rl"} - pinned.keys() == set()
    assert len(pinned) == len(re.findall(r"^[\w-]+==", lock, re.MULTILINE))
    assert not re.search(r"https?:|file:|index-url|find-links", lock)


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_contributing_has_the_arrows_of_the_import_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (lines,) = (contract["arrows"] for contract in contracts if contract["type"] == "rooms")
    stated = dict(line.split(" ->") for line in lines if not line.startswith("__main__"))
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert {room: re.findall(r"[a-z_]+", arrows) for room, arrows in stated.items()} == {
        room: re.findall(r"(?<![.\w])[a-z_]+", arrows) for room, arrows in rows
    }
