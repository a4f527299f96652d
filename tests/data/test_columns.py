"""The schema of a batch lists every column that the package writes, and its writers and readers are real."""

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch

from megatron_rl.data.columns import COLUMNS, EXTRA
from megatron_rl.data.loss_inputs import TENSORS, LossInputs, OptionalInput
from megatron_rl.data.types import Batch
from megatron_rl.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_rl"
NO_COLUMNS = {"lengths_B", "logprobs_T", "entropies_T"}
"""Names with a suffix that are no columns: of the file of a batch, and of the results of ``prove``."""


def strings(module: Path) -> set[str]:
    """Return the string constants of a module."""
    nodes = ast.walk(ast.parse(module.read_text()))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def words(name: str) -> set[str]:
    """Return the string constants and the attributes of a module."""
    module = PACKAGE / f"{name.replace('.', '/')}.py"
    nodes = ast.walk(ast.parse(module.read_text()))
    return strings(module) | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_every_column_that_the_package_names_is_in_the_schema():
    named = {word for module in PACKAGE.rglob("*.py") for word in strings(module) if not word.startswith(EXTRA)}
    assert {word for word in named if re.fullmatch(r"[a-z0-9_]+_[TB]", word)} - COLUMNS.keys() == NO_COLUMNS


@pytest.mark.parametrize("name", COLUMNS)
def test_writer_and_readers_of_a_column_name_it(name: str):
    column = COLUMNS[name]
    assert name in words(column.writer)
    for reader in column.readers:
        assert words(reader) & {name, name.replace("_T", "_R")}, reader


def test_inputs_of_the_loss_are_columns_and_the_optional_ones_are_declared():
    assert set(TENSORS.values()) <= COLUMNS.keys()
    optional = {entry.name for entry in fields(LossInputs) if entry.name in TENSORS and entry.default is None}
    assert optional == set(get_args(OptionalInput))
    assert all(COLUMNS[column].missing for column in TENSORS.values())


def batch(**columns: torch.Tensor) -> Batch:
    return Batch(torch.tensor([2, 1]), {"loss_mask_T": torch.tensor([True, False, True]), **columns})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"odl_logprobs_T": torch.zeros(3)}, "a batch has no column odl_logprobs_T: .* extra_NAME_T"),
        ({"old_logprobs_T": torch.zeros(2)}, r"old_logprobs_T has shape \[2\], expected \[3\]"),
        ({"advantages_B": torch.zeros(3)}, r"advantages_B has shape \[3\], expected \[2\]"),
        ({"routes_T": torch.zeros(3, dtype=torch.uint8)}, r"routes_T has shape \[3\], expected \[3, L, K\]"),
        ({"rewards_B": torch.zeros(2, dtype=torch.int64)}, "rewards_B is int64, expected float32 or float64"),
        ({"extra_thing_B": torch.zeros(2)}, "a batch has no column extra_thing_B"),
    ],
)
def test_a_batch_refuses_what_is_not_in_the_schema(columns: dict[str, torch.Tensor], message: str):
    with pytest.raises(ConfigError, match=message):
        batch(**columns)


def test_missing_inputs_name_the_column_and_who_provides_it():
    with pytest.raises(
        ConfigError, match=r"needs the column old_logprobs_T, which .*; policy_loss takes it as old_log"
    ):
        LossInputs.gather(batch())
    needed = ("old_logprobs_T", "advantages_T", "weights_T", "response_shares_T")
    inputs = LossInputs.gather(batch(**dict.fromkeys(needed, torch.zeros(3)), extra_own_T=torch.tensor([4, 5, 6])))
    assert inputs.extra["own"].tolist() == [4, 6]
    with pytest.raises(
        ConfigError, match=r"reads ref_logprobs_R, which the batch lacks: .* kl\.coefficient is above 0"
    ):
        inputs.require("ref_logprobs_R")
