"""The pages of docs/: every command is described, every link and path exists, and the code of the guides works."""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rl.algorithms.objectives import Objective
from megatron_rl.cli.command import all_parsers
from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.types import Batch
from megatron_rl.launch.planning.run_plan import make_plan
from megatron_rl.models.hf_mapping.rules import Family
from tests.oracle.objectives import Row, framed, weight
from tests.policy.families import COMMON

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of every command."""
    return all_parsers()


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the options of a parser, and those of its actions if it has any."""
    actions = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    inner = [options_of(choice) for choices in actions for choice in choices.values()]
    return set(parser._option_string_actions).union(*inner)


def test_every_command_has_a_section_with_an_example():
    text = (DOCS / "commands.md").read_text()
    headings = re.findall(r"^## (\S+)$", text, re.MULTILINE)
    assert set(commands()) == set(headings)
    assert [verb for verb in headings if f"    megatron-rl {verb} " not in text] == []


PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@by_page
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@by_page
def test_paths_exist(page):
    folders = "benchmarks|configs|docs|examples|launch|locks|megatron_rl|studies|tests|tools"
    paths = re.findall(rf"(?<![\w./-])(?:{folders})/[\w./+-]*\w", page.read_text())
    written_by_the_reader = {"mine", "mine.py", "mistral.py", "chunk.py", "chunk.toml"}
    missing = {path for path in paths if not (ROOT / path).exists() and not (ROOT / "megatron_rl" / path).exists()}
    assert {path for path in missing if Path(path).name not in written_by_the_reader} == set()


@by_page
def test_commands_and_their_options_exist(page):
    text = page.read_text().replace("\\\n", "")
    for verb, words in re.findall(r"(?:megatron-rl|-m megatron_rl) ([a-z-]+)([^\n`]*)", text):
        if verb in commands():
            options = options_of(commands()[verb])
            assert [
                word for word in re.findall(r"(?<!\S)--[a-z-]+", words.partition(" #")[0]) if word not in options
            ] == []
        else:
            assert f"\n## {verb}\n" in (DOCS / "commands.md").read_text(), verb


@by_page
def test_settings_exist(page):
    known: set[str] = set()
    for section, rows in re.findall(
        r"## \[(\w+)\][^\n]*\n(.*?)(?=\n## |\Z)", (DOCS / "config.md").read_text(), re.DOTALL
    ):
        known |= {f"{section}.{key}" for key in re.findall(r"^\| `([\w.]+)`", rows, re.MULTILINE)} | {f"{section}.name"}
    prefixes = {name.rpartition(".")[0] for name in known}
    sections = "|".join(prefix for prefix in prefixes if "." not in prefix)
    settings = set(re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)(?![\w/(]|\.\w)", page.read_text()))
    free = {"model.megatron", "rollout.environment", "rollout.sglang", "rollout.vllm", "task.mixture", "task.options"}
    unknown = {name for name in settings - known - prefixes if not any(name.startswith(table) for table in free)}
    assert {name for name in unknown if not name.endswith((".py", ".md", ".jsonl", ".json", ".toml", ".path"))} == set()


def blocks(page: str) -> list[str]:
    """Return the Python code of a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["quickstart.md", "tasks.md"])
def test_the_configs_of_a_page_have_only_settings_that_exist(page, tmp_path):
    found = re.findall(r"```toml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert found
    for text in found:
        (tmp_path / "a.toml").write_text(text)
        # The demo's model answers in 40 tokens; the pages are about longer ones.
        load(
            Run, [DOCS.parent / "configs" / "demo.toml", tmp_path / "a.toml"], ["rollout.sampling.max_new_tokens=2048"]
        )


RECIPES = [
    words.split()
    for words in re.findall(r"`([^`]+)`", (DOCS / "practice-2026.md").read_text())
    if words.startswith("configs/") or "=" in words.split()[0]
]


@pytest.mark.parametrize("recipe", RECIPES, ids=" ".join)
def test_lines_of_the_practice_page_can_start_and_need_no_warning(recipe):
    overlays = [ROOT / word for word in recipe if "=" not in word]
    demo, settings = ROOT / "configs" / "demo.toml", [word for word in recipe if "=" in word]
    assert load(Run, [demo, *overlays], settings).run != load(Run, [demo]).run
    assert make_plan(load(Run, [demo, *overlays], settings), None, on_gloo=True).warnings == ()


def test_each_row_of_the_practice_page_has_a_line():
    rows = re.findall(r"^\| .* \|$", (DOCS / "practice-2026.md").read_text(), re.MULTILINE)
    assert [row for row in rows if not re.search(r"`[^`]+`", row) and "settings" not in row] == []
    assert len(RECIPES) >= len(rows) - 2


def test_the_objective_of_the_guide_loads_from_a_file(tmp_path):
    (tmp_path / "chunk.py").write_text(blocks("add-objective.md")[0])
    objective = load(
        Run, [DOCS.parent / "configs" / "demo.toml"], [f"objective.name={tmp_path}/chunk.py:Chunk"]
    ).run.objective
    assert objective.label == "chunk.py:Chunk"


def test_the_objective_of_the_guide_is_its_formula():
    code, oracle = blocks("add-objective.md")
    made: dict[str, Any] = {"__name__": "chunk"}
    exec(compile(code, "add-objective.md", "exec", dont_inherit=True), made)
    objective: Objective = made["Chunk"](length=3)
    mask_T = torch.tensor([0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1], dtype=torch.bool)
    random = torch.Generator().manual_seed(0)
    old_T, new_T = (-torch.rand(13, generator=random, dtype=torch.float64) for _ in range(2))
    columns = {
        "input_ids_T": torch.zeros(13, dtype=torch.int64),
        "loss_mask_T": mask_T,
        "old_logprobs_T": old_T,
        "advantages_B": torch.tensor([1.0, -0.5]),
    }
    batch = Batch(torch.tensor([5, 8]), columns)
    inputs = LossInputs.gather(batch.add(objective.prepare(batch)))
    loss = (objective.cost(new_T[mask_T], inputs).values_R * inputs.weights_R).sum()
    spread: dict[str, Any] = {"framed": framed, "weight": weight, "Result": tuple}
    exec(compile(oracle, "add-objective.md", "exec", dont_inherit=True), spread)
    new, old = new_T.tolist(), old_T.tolist()
    rows = [Row(new[1:5], old[1:5], [], 1.0), Row(new[6:], old[6:], [], -0.5)]
    assert float(loss) == pytest.approx(spread["chunk"](rows, 3)[0], abs=1e-12)


def test_the_family_of_the_guide_accounts_for_every_tensor():
    (code, added) = blocks("add-family.md")
    made: dict[str, Any] = {"__name__": "mistral"}
    exec(compile(code, "add-family.md", "exec", dont_inherit=True), made)
    settings = eval(f"{{{added}}}")["mistral"][1]
    config = AutoConfig.for_model("mistral", **{**COMMON, **settings})
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    family: Family = made["family"](config.to_dict())
    assert family.hf_shapes() == expected
