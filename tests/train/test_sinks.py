"""Trackers get what metrics.jsonl gets, need no network, and cannot stop a run."""

import sys
import urllib.request
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_rl.config.schema import Log
from megatron_rl.train.journal import Journal
from megatron_rl.train.profile import Traces
from megatron_rl.train.sinks import Careful, Prometheus, missing_packages, open_sinks

METRICS = {"reward_mean": 0.5, "grad_norm": 2, "accuracy": None}


def journal_with(tmp_path: Path, *names: str) -> Journal:
    settings = Log.model_validate({"path": str(tmp_path / "run"), "sinks": names})
    (tmp_path / "run").mkdir(exist_ok=True)
    return Journal(tmp_path / "run", 2, sinks=open_sinks(settings, {"train.steps": 2}), terminal=False)


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **functions: object) -> None:
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard_holds_every_number_of_every_step(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with journal_with(tmp_path, "tensorboard") as journal:
        for step in range(2):
            with journal.phase("train"):
                pass
            journal.write(step, METRICS)

    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert {"reward_mean", "grad_norm", "seconds/train", "seconds/total"} <= set(found.Tags()["scalars"])
    assert [(event.step, event.value) for event in found.Scalars("reward_mean")] == [(0, 0.5), (1, 0.5)]


def test_wandb_goes_on_with_the_run_of_the_same_name_and_is_offline_without_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    given: list[object] = []
    options: dict[str, object] = {}
    run = SimpleNamespace(log=lambda numbers, step: given.append((step, numbers)), finish=lambda: given.append("end"))
    fake(monkeypatch, "wandb", init=lambda **words: options.update(words) or run)

    with journal_with(tmp_path, "wandb") as journal:
        journal.write(0, METRICS)

    assert options["mode"] == "offline"
    assert (options["id"], options["resume"]) == ("run", "allow")
    assert given == [(0, {"reward_mean": 0.5, "grad_norm": 2.0, "seconds/total": 0.0}), "end"]


def test_mlflow_and_trackio_keep_their_data_in_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", "")
    monkeypatch.delenv("TRACKIO_DIR")
    given: list[tuple[object, ...]] = []
    names = ("set_tracking_uri", "set_experiment", "start_run", "log_params", "log_metrics", "end_run")
    fake(monkeypatch, "mlflow", **{n: lambda *a, n=n, **k: given.append((n, a, k)) for n in names})
    fake(monkeypatch, "trackio", **{n: lambda *a, n=n, **k: given.append((n, a, k)) for n in ("init", "log", "finish")})

    with journal_with(tmp_path, "mlflow", "trackio") as journal:
        journal.write(0, METRICS)

    assert given[0] == ("set_tracking_uri", (f"sqlite:///{tmp_path}/run/mlflow.db",), {})
    assert [call[0] for call in given].count("log_metrics") == 1
    assert [call[0] for call in given].count("log") == 1


def test_a_sink_that_fails_is_told_of_once_and_the_run_goes_on(caplog):
    calls = []

    class Broken:
        def write(self, step, numbers):
            calls.append(step)
            raise OSError("no route to host")

        def close(self):
            calls.append("closed")

    sink = Careful("wandb", Broken())
    for step in range(3):
        sink.write(step, {})
    sink.close()

    assert calls == [0]
    assert caplog.messages == ["log.sinks: wandb failed and gets no more metrics: no route to host"]


def test_prometheus_reads_the_newest_step_on_loopback():
    pytest.importorskip("prometheus_client")
    endpoint = Prometheus(0, "127.0.0.1")
    try:
        endpoint.write(0, {"reward_mean": 0.25, "seconds/train": 1.5})
        endpoint.write(1, {"reward_mean": 0.75})
        with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    finally:
        endpoint.close()

    assert {"megatron_rl_reward_mean 0.75", "megatron_rl_seconds_train 1.5", "megatron_rl_step 1.0"} <= set(lines)


def test_a_sink_without_its_package_is_found_before_the_run(monkeypatch):
    monkeypatch.setattr("megatron_rl.train.sinks.find_spec", lambda name: None)

    found = dict(missing_packages(Log(sinks=("wandb",), prometheus_port=0)))

    assert set(found) == {"wandb", "prometheus"}
    assert "pip install 'megatron-rl[track]'" in found["wandb"]


def test_only_the_phases_and_steps_asked_for_are_traced(tmp_path):
    journal = Journal(None, 3, traces=Traces(tmp_path, [1], rank=4))
    for step in range(3):
        for phase in ("rollout", "train"):
            with journal.phase(phase):
                pass
        journal.write(step, {})

    assert [path.name for path in tmp_path.iterdir()] == ["step_000001_train_rank_4.json.gz"]
