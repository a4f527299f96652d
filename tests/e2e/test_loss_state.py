"""Runs whose loss adapts numbers or whose advantages change after sampling: stopped after two steps, they go on alike.

The coefficient of the entropy bonus is in every other run of this folder.
"""

from pathlib import Path

import pytest

from tests.e2e.job import Job, metrics_of, same_result

ADVANTAGES = ("advantage.arm_alpha=0.3", "advantage.pruning=0.6")
DATA = ("parallel.tensor=1", "parallel.expert=1", "parallel.ranks=2")
ADAPTED = {
    "r2vpo, arm, pruning": ("objective/multiplier", "entropy_coefficient", "pruned_fraction"),
    "bapo": ("objective/low", "objective/high", "objective/positive_share", "entropy_coefficient"),
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("r2vpo, arm, pruning", ("objective.name=r2vpo", *ADVANTAGES, *DATA, "train.filter_zero_variance=false")),
        pytest.param("bapo", ("objective.name=bapo",), marks=pytest.mark.slow),
    ],
    ids=list(ADAPTED),
)
def test_two_and_two_steps_are_four_where_the_loss_adapts(tmp_path: Path, name: str, settings: tuple[str, ...]) -> None:
    with Job(tmp_path / "straight", *settings) as job:
        assert job.end() == 0, job.output()
    for words in (["train.steps=2"], ["train.resume=true"]):
        with Job(tmp_path / "run", *settings, *words) as job:
            assert job.end() == 0, job.output()
    same_result(tmp_path / "run", tmp_path / "straight")
    for key in ADAPTED[name]:
        assert len({line[key] for line in metrics_of(tmp_path / "run")}) > 1, key
    assert [line["first_ratio_max"] for line in metrics_of(tmp_path / "run")] == [1.0] * 4
