"""An objective in a user's file works with every command, like a built-in one."""

import json
import re
from pathlib import Path

import pytest

from megatron_rl.cli import main
from tests.e2e.job import DEMO, Job, metrics_of

FILE = '''
"""An objective from outside the package, with an option and a column that no built-in objective has."""

import torch

from megatron_rl.algorithms.objectives.base import Aggregated, Cost, NonNegative
from megatron_rl.algorithms.segments import segment_ratio


class Mine(Aggregated):
    """Weighted log-likelihood, without tokens of low entropy."""

    cap: NonNegative
    """Largest importance weight."""

    def columns(self, tokens, vocabulary, segment_ids_R):
        trained_R = (tokens.entropies_R >= 0.01).double()
        return {"weights_T": self.weights(tokens), "extra_trained_T": trained_R}

    def cost(self, logprobs_R, inputs):
        ratio = segment_ratio(logprobs_R - inputs.old_logprobs_R, inputs)
        weight_R = ratio.value_R.clamp(max=self.cap) * inputs.extra["trained"]
        # No built-in objective reports every token as clipped: the metrics show that this one ran.
        return Cost(-weight_R * inputs.advantages_R * logprobs_R, torch.ones_like(weight_R).bool(), ratio)
'''


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file that names the objective relative to its folder; no command of this module runs there."""
    folder = tmp_path_factory.mktemp("objective_file")
    (folder / "objectives").mkdir()
    (folder / "objectives" / "mine.py").write_text(FILE)
    (folder / "mine.toml").write_text(
        '[objective]\nname = "objectives/mine.py:Mine"\ncap = 1.5\naggregation = "token"\n'
    )
    return folder / "mine.toml"


def test_a_run_trains_resumes_and_is_reported(overlay: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Job(folder, "train.steps=2", overlays=[str(overlay)]) as job:
        assert job.end() == 0, job.output()
    saved = json.loads((folder / "config.json").read_text())["objective"]
    assert saved == {
        "name": f"{overlay.parent}/objectives/mine.py:Mine",
        "cap": 1.5,
        "aggregation": "token",
        "normalizer": None,
    }

    with Job(folder, "train.steps=3", "train.resume=true", overlays=[str(folder / "config.json")]) as job:
        assert job.end() == 0, job.output()
        changes = re.findall(r"resumed with changed settings:\n((?:  .*\n)*)", job.output())
    assert changes == ["  train.steps: 2 -> 3\n"]
    assert json.loads((folder / "config.json").read_text())["objective"] == saved
    lines = metrics_of(folder)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["clipped_fraction"] for line in lines] == [1.0] * 3
    assert min(line["grad_norm"] for line in lines) > 0

    page = tmp_path / "report.html"
    assert main(["report", str(folder), "--output", str(page)]) == 0
    html = page.read_text()
    (note,) = re.findall(r'class="note">(.*?)</p>', html)
    assert "changed at step 2: train.steps 2 -&gt; 3" in note
    assert "<td>mine.py:Mine</td>" in html


def test_layouts_give_the_gradient_of_one_rank(overlay: Path, tmp_path: Path) -> None:
    shrink = ["--shrink", "layers=2,hidden=48"]
    output = tmp_path / "prove.json"
    assert main(["prove", DEMO, str(overlay), "--layout", "tensor=2", *shrink, "--output", str(output)]) == 0
    (result,) = json.loads(output.read_text())["results"]
    assert result["objective"] == f"{overlay.parent}/objectives/mine.py:Mine"
    assert result["holds"]


def test_check_names_the_objective_and_its_options(overlay: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["check", DEMO, str(overlay), "rollout.max_lag=1", "--settings"]) == 0
    printed = " ".join(capfd.readouterr().out.split())
    assert "mine.py:Mine does not bound a ratio" in printed
    assert re.search(r"objective\.cap\W+1\.5\W", printed)
    assert " runs learns " in printed
