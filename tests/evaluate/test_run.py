"""Evaluation of a demo run and its checkpoints: all kinds of folders, new servers and running servers."""

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

pytestmark = pytest.mark.processes

SETTINGS = ("evaluate.prompts=24", "evaluate.samples=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run of two steps, with evaluations before each step and after the last."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    settings = (
        "train.steps=2",
        "evaluate.every=1",
        "checkpoint.every=1",
        "checkpoint.export=true",
        "optimizer.lr=1e-3",
    )
    with Job(folder, *ONE_RANK, *SETTINGS, *settings) as job:
        assert job.end() == 0, job.output()
    return folder


@pytest.fixture(scope="module")
def newest(run) -> Path:
    """The evaluation of the newest weights of the run."""
    assert main(["eval", str(run)]) == 0
    return run / "eval" / "step_00000002"


def accuracies(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["accuracy"] for line in lines if "accuracy" in line]


def pass_at_1(result: Path) -> float:
    return json.loads((result / "result.json").read_text())["figures"][0]["pass@1"]["mean"]


def samples(result: Path) -> bytes:
    return (result / "samples.jsonl").read_bytes()


def test_eval_of_a_run_equals_its_last_evaluation(run, newest):
    description = json.loads((newest / "evaluation.json").read_text())
    assert description["weights"]["path"] == str(run / "export")
    assert (description["prompts"], description["samples"]) == (24, 2)
    assert pass_at_1(newest) == accuracies(run)[-1]


def test_eval_of_a_training_checkpoint_equals_the_evaluation_of_its_step(run):
    checkpoint = run / "checkpoints" / "step_00000001"
    assert main(["eval", str(checkpoint)]) == 0
    assert pass_at_1(run / "eval" / checkpoint.name) == accuracies(run)[1]
    assert accuracies(run)[1] != accuracies(run)[0] or accuracies(run)[1] != accuracies(run)[2]


def test_a_converted_checkpoint_gives_the_same_samples(run, newest, tmp_path):
    other = tmp_path / "other"
    to_megatron.convert(run / "export", other / "exports" / "step_00000002", 1, Console(quiet=True))
    shutil.copyfile(run / "config.json", other / "config.json")
    assert main(["eval", str(other)]) == 0
    result = other / "eval" / newest.name
    description = json.loads((result / "evaluation.json").read_text())
    assert is_torch_dist(Path(description["weights"]["path"]))
    assert samples(result) == samples(newest)


def test_running_servers_receive_the_weights_first(run, newest, tmp_path):
    server = embedded_server(str(ROOT / "configs" / "demo-model"), tmp_path / "server.log")
    server.start()
    try:
        words = [str(run), f'rollout.urls=["{server.url}"]', f"--output={tmp_path / 'result'}"]
        assert main(["eval", *words]) == 0
    finally:
        server.stop()
    assert samples(tmp_path / "result") == samples(newest)


def test_first_and_last_weights_are_compared(run, newest, tmp_path, capsys):
    start = str(ROOT / "configs" / "demo-model")
    words = [str(run / "config.json"), start, f"--output={tmp_path / 'start'}"]
    assert main(["eval", *words]) == 0
    assert main(["eval", "--compare", str(tmp_path / "start"), str(newest)]) == 0
    assert "sign-flip" in capsys.readouterr().out


def test_a_step_of_a_run_is_evaluated_and_runs_are_compared(run, newest, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("eval"))
    assert main(["eval", "--compare", str(run), str(other)]) == 2
    assert f"{other} has no finished evaluation; run: megatron-rl eval {other}\n" in capsys.readouterr().err
    assert main(["eval", str(other), "--step", "1"]) == 0
    assert pass_at_1(other / "eval" / "step_00000001") == accuracies(run)[1]
    assert main(["eval", "--compare", str(run), str(other)]) == 0
    assert f"A: {newest}\nB: {other}/eval/step_00000001\n" in capsys.readouterr().out
    assert main(["eval", "--compare", str(run), str(other), "--step", "2"]) == 2
    assert f"no finished evaluation of step 2; run: megatron-rl eval {other} --step 2" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--step", "2"]])
def test_a_training_checkpoint_is_converted_to_the_export_of_its_step(run, tmp_path, options, capsys):
    assert main(["convert", str(run), str(tmp_path / "model"), *options]) == 0
    assert f" of {run}/checkpoints/step_00000002 in " in capsys.readouterr().out
    assert main(["convert", "verify", str(tmp_path / "model"), str(run / "export")]) == 0
    names = {path.name for path in (run / "export").iterdir()} - {
        "model-00001.safetensors",
        "model.safetensors.index.json",
    }
    for name in names:
        assert (tmp_path / "model" / name).read_bytes() == (run / "export" / name).read_bytes()


def test_weights_in_hugging_face_format_are_not_converted_again(run, tmp_path, capsys):
    assert main(["convert", str(run / "export"), str(tmp_path / "model")]) == 2
    assert "it has the weights in Hugging Face format already" in capsys.readouterr().err
    assert main(["convert", str(run), str(tmp_path / "model"), "--step", "7"]) == 2
    assert "no training checkpoint of step 7; there are steps 1, 2" in capsys.readouterr().err


def test_an_engine_that_cannot_read_a_checkpoint_gets_a_copy(run, tmp_path, monkeypatch):
    seen: list[Path] = []

    @contextmanager
    def open_fleet(description, tokenizer, transport, *, pushes):
        folder = Path(description.model.path)
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
