"""A run of the demo, and its checkpoints evaluated: every kind of folder, our own servers and running ones."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from megatron_rl.cli import main
from megatron_rl.convert import to_megatron
from megatron_rl.evaluate import servers
from megatron_rl.evaluate.targets import find_targets
from megatron_rl.fleet.process import embedded_server
from megatron_rl.models.checkpoint_folders import holds_hf_files, open_checkpoint
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.torch_dist import is_torch_dist
from tests.e2e.job import ONE_RANK, ROOT, Job

SETTINGS = ("evaluate.prompts=24", "evaluate.samples=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of two steps that were evaluated before each and after the last."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    kept = ("train.steps=2", "evaluate.every=1", "checkpoint.every=1", "checkpoint.export=true", "optimizer.lr=1e-3")
    with Job(folder, *ONE_RANK, *SETTINGS, *kept) as job:
        assert job.end() == 0, job.output()
    return folder


@pytest.fixture(scope="module")
def newest(run) -> Path:
    """The result of the run's newest weights."""
    assert main(["eval", str(run)]) == 0
    return run / "eval" / "step_00000002"


def accuracies(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["accuracy"] for line in lines if "accuracy" in line]


def pass_at_1(result: Path) -> float:
    return json.loads((result / "result.json").read_text())["figures"][0]["pass@1"]["mean"]


def samples(result: Path) -> bytes:
    return (result / "samples.jsonl").read_bytes()


def test_a_run_is_evaluated_as_it_evaluated_itself(run, newest):
    asked = json.loads((newest / "evaluation.json").read_text())
    assert asked["weights"]["path"] == str(run / "export")
    assert (asked["prompts"], asked["samples"]) == (24, 2)
    assert pass_at_1(newest) == accuracies(run)[-1]


def test_a_training_checkpoint_on_the_way_likewise(run):
    checkpoint = run / "checkpoints" / "step_00000001"
    assert main(["eval", str(checkpoint)]) == 0
    assert pass_at_1(run / "eval" / checkpoint.name) == accuracies(run)[1]
    assert accuracies(run)[1] != accuracies(run)[0] or accuracies(run)[1] != accuracies(run)[2]


def test_a_megatron_checkpoint_answers_like_the_files_it_came_from(run, newest, tmp_path):
    other = tmp_path / "other"
    to_megatron.convert(run / "export", other / "exports" / "step_00000002", 1, Console(quiet=True))
    shutil.copyfile(run / "config.json", other / "config.json")
    assert main(["eval", str(other)]) == 0
    result = other / "eval" / newest.name
    asked = json.loads((result / "evaluation.json").read_text())
    assert is_torch_dist(Path(asked["weights"]["path"]))
    assert samples(result) == samples(newest)


def test_running_servers_get_the_weights_first(run, newest, tmp_path):
    server = embedded_server(str(ROOT / "configs" / "demo-model"), tmp_path / "server.log")
    server.start()
    try:
        words = [str(run), f'rollout.urls=["{server.url}"]', f"--output={tmp_path / 'result'}"]
        assert main(["eval", *words]) == 0
    finally:
        server.stop()
    assert samples(tmp_path / "result") == samples(newest)


def test_the_start_is_compared_with_the_end(run, newest, tmp_path, capsys):
    start = str(ROOT / "configs" / "demo-model")
    words = [str(run / "config.json"), start, f"--output={tmp_path / 'start'}"]
    assert main(["eval", *words]) == 0
    assert main(["eval", "--compare", str(tmp_path / "start"), str(newest)]) == 0
    assert "sign-flip" in capsys.readouterr().out


def test_an_engine_that_cannot_read_a_checkpoint_gets_a_copy(run, tmp_path, monkeypatch):
    seen: list[Path] = []

    @contextmanager
    def open_fleet(asked, world, tokenizer):
        folder = Path(asked.model.path)
        assert holds_hf_files(folder)
        family = family_of(read_hf_config(folder))
        copy, export = (open_checkpoint(place, family) for place in (folder, run / "export"))
        assert all(torch.equal(copy.read(name), export.read(name)) for name in family.hf_shapes())
        seen.append(folder)
        yield

    monkeypatch.setattr(servers, "open_fleet", open_fleet)
    (target,) = find_targets([str(run / "checkpoints" / "step_00000002")], ["rollout.engine=sglang"], tmp_path)
    with servers.serving(target.run, AutoTokenizer.from_pretrained(target.run.model.path), tmp_path):
        pass
    (folder,) = seen
    assert not folder.exists()
