"""Trackers get what metrics.jsonl gets, need no network, and cannot stop a run."""

import json
import os
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from transformers import AutoTokenizer

from megatron_rl.config.load import load
from megatron_rl.config.schema import Log, Run
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.members import Timeouts
from megatron_rl.observability.profile import Traces
from megatron_rl.observability.recorder import RunRecorder
from megatron_rl.observability.sinks import FaultTolerantSink, Prometheus, missing_packages, open_sinks
from megatron_rl.rollout.gauges import gauges
from megatron_rl.rollout.stream import Stream
from megatron_rl.tasks import make_task
from megatron_rl.weights.tensor import TensorTransport
from tests.fleet.fake import FakeServer, serving

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.toml"
METRICS = {"reward_mean": 0.5, "grad_norm": 2, "accuracy": None}


def recorder_with(tmp_path: Path, *names: str) -> RunRecorder:
    settings = Log.model_validate({"path": str(tmp_path / "run"), "sinks": names})
    (tmp_path / "run").mkdir(exist_ok=True, parents=True)
    return RunRecorder(tmp_path / "run", 2, sinks=open_sinks(settings, {"train.steps": 2}), terminal=False)


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **functions: object) -> None:
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard_holds_every_number_of_every_step(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with recorder_with(tmp_path, "tensorboard") as recorder:
        for step in range(2):
            with recorder.phase("train"):
                pass
            recorder.write(step, METRICS)

    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert {"reward_mean", "grad_norm", "seconds/train", "seconds/total"} <= set(found.Tags()["scalars"])
    assert [(event.step, event.value) for event in found.Scalars("reward_mean")] == [(0, 0.5), (1, 0.5)]


def test_wandb_goes_on_with_the_run_of_the_folder_and_is_offline_without_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    given: list[object] = []
    options: dict[str, object] = {}
    run = SimpleNamespace(log=lambda numbers, step: given.append((step, numbers)), finish=lambda: given.append("end"))
    fake(monkeypatch, "wandb", init=lambda **words: options.update(words) or run)

    with recorder_with(tmp_path, "wandb") as recorder:
        recorder.write(0, METRICS)

    assert options["mode"] == "offline"
    first = options["id"]
    assert str(first).startswith("run-")
    assert options["resume"] == "allow"
    assert given == [(0, {"reward_mean": 0.5, "grad_norm": 2.0, "seconds/total": 0.0}), "end"]
    with recorder_with(tmp_path, "wandb"):
        assert options["id"] == first
    with recorder_with(tmp_path / "other", "wandb"):  # another run whose folder has the same name
        assert options["id"] != first


def test_mlflow_and_trackio_keep_their_data_in_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", "")
    monkeypatch.delenv("TRACKIO_DIR")
    given: list[tuple[object, ...]] = []
    names = ("set_tracking_uri", "set_experiment", "start_run", "log_params", "log_metrics", "end_run")
    run = SimpleNamespace(info=SimpleNamespace(run_id="4711"))
    fake(monkeypatch, "mlflow", **{n: lambda *a, n=n, **k: given.append((n, a, k)) or run for n in names})
    fake(monkeypatch, "trackio", **{n: lambda *a, n=n, **k: given.append((n, a, k)) for n in ("init", "log", "finish")})

    with recorder_with(tmp_path, "mlflow", "trackio") as recorder:
        recorder.write(0, METRICS)

    assert given[0] == ("set_tracking_uri", (f"sqlite:///{tmp_path}/run/mlflow.db",), {})
    assert [call[0] for call in given].count("log_metrics") == 1
    assert [call[0] for call in given].count("log") == 1
    given.clear()
    with recorder_with(tmp_path, "mlflow") as recorder:  # resumed from a checkpoint before step 0
        recorder.write(0, METRICS)
        recorder.write(1, METRICS)
    assert ("start_run", (), {"run_id": "4711"}) in given
    assert [call[2] for call in given if call[0] == "log_metrics"] == [{"step": 1}]


def test_a_sink_that_cannot_be_opened_is_logged_once_and_training_continues(tmp_path, monkeypatch, caplog):
    def refuse(**words):
        raise refusal

    for refusal in (OSError("no route to host"), ValueError("bad project"), TypeError("no such argument")):
        caplog.clear()
        fake(monkeypatch, "wandb", init=refuse)
        with recorder_with(tmp_path, "wandb") as recorder:
            recorder.write(0, METRICS)
        assert caplog.messages == [f"log.sinks: wandb could not be opened and gets no more metrics: {refusal}"]


def test_an_error_that_only_the_tracker_has_disables_it(tmp_path, monkeypatch, caplog):
    class CommError(Exception):
        pass

    def refuse(**words):
        raise CommError("401")

    fake(monkeypatch, "wandb.errors", Error=CommError)
    fake(monkeypatch, "wandb", init=refuse, errors=sys.modules["wandb.errors"])
    with recorder_with(tmp_path, "wandb"):
        pass
    assert caplog.messages == ["log.sinks: wandb could not be opened and gets no more metrics: 401"]


def test_the_first_failure_of_a_sink_is_logged_and_training_continues(caplog):
    calls = []

    class Broken:
        def write(self, step, numbers):
            calls.append(step)
            raise OSError("no route to host")

        def register(self, read):
            calls.append("registered")

        def close(self):
            calls.append("closed")

    sink = FaultTolerantSink("wandb", Broken)
    for step in range(3):
        sink.write(step, {})
    sink.close()

    assert calls == [0]
    assert caplog.messages == ["log.sinks: wandb failed and gets no more metrics: no route to host"]


@pytest.mark.processes
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


def scraped(endpoint: Prometheus) -> dict[str, float]:
    """Return what the endpoint says now, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@pytest.mark.processes
def test_prometheus_shows_the_queue_and_the_servers_as_they_are_when_asked():
    pytest.importorskip("prometheus_client")
    settings = ["rollout.max_lag=1", "train.prompts_per_step=3", "train.group_size=2", "train.steps=5"]
    run = load(Run, [DEMO], [*settings, "rollout.sampling.max_new_tokens=5"]).run
    timeouts = Timeouts(start_timeout_seconds=5, probe_seconds=0.05, probe_timeout_seconds=0.2, probe_failures=2)
    endpoint = Prometheus(0, "127.0.0.1")
    with (
        serving(FakeServer(), FakeServer()) as (good, bad),
        Fleet.open([good.url, bad.url], TensorTransport(1 << 20), timeouts, sequences_per_request=2) as fleet,
    ):
        stream = Stream(run, fleet, make_task(run.task, AutoTokenizer.from_pretrained(run.model.path)))
        endpoint.register(lambda: gauges(stream))
        try:
            before = scraped(endpoint)
            good.delay_seconds = bad.delay_seconds = 1.0
            stream.request_groups(0)
            waiting = scraped(endpoint)
            good.delay_seconds = bad.delay_seconds = 0.0
            stream.take(0)
            while any(not pending.done() for pending in stream._pending):
                time.sleep(0.01)
            stream.state()
            fleet.sync.version = fleet.members[0].version = "1"  # as after a push that the second server missed
            fleet._loop.call(_leave(fleet, bad.url))
            after = scraped(endpoint)
        finally:
            endpoint.close()

    making, finished = (f'megatron_rl_queue_groups{{state="{state}"}}' for state in ("in progress", "finished"))
    up, lag = (f'megatron_rl_server_{name}{{server="%s"}}' for name in ("up", "weights_lag"))
    assert (before[making], before[finished], before["megatron_rl_servers_up"]) == (0, 0, 2)
    assert (waiting[making], waiting[finished], waiting["megatron_rl_queue_steps"]) == (6, 0, 2)
    assert waiting[f'megatron_rl_server_requests{{server="{good.url}"}}'] >= 1
    assert (after[making], after[finished], after["megatron_rl_queue_lag"]) == (0, 3, 1)
    assert (after[up % good.url], after[up % bad.url], after["megatron_rl_servers_up"]) == (1, 0, 1)
    assert (after[lag % good.url], after[lag % bad.url]) == (0, 1)


async def _leave(fleet: Fleet, url: str) -> None:
    [member] = [member for member in fleet.members if member.url == url]
    member.leave("it is to be seen", Timeouts(probe_seconds=60))


def keep_run(tmp_path: Path, name: str, **environment: str) -> Path:
    """Write two steps to a real tracker, in a process of its own: each keeps what it is told first. Return RUN."""
    pytest.importorskip(name)
    code = (
        "import sys; from pathlib import Path; from tests.observability.test_sinks import METRICS, recorder_with\n"
        f"with recorder_with(Path(sys.argv[1]), {name!r}) as recorder:\n"
        "    for step in range(2): recorder.write(step, METRICS)\n"
    )
    unset = ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_DIR")
    kept = {variable: value for variable, value in os.environ.items() if variable not in unset}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={**kept, **environment}, cwd=ROOT)
    return tmp_path / "run"


def test_wandb_itself_keeps_an_offline_run(tmp_path):
    [kept] = (keep_run(tmp_path, "wandb") / "wandb").glob("offline-run-*/run-run.wandb")
    assert b"reward_mean" in kept.read_bytes()


@pytest.mark.parametrize("own", [False, True], ids=["sqlite", "file store"])
def test_mlflow_itself_keeps_every_step(tmp_path, monkeypatch, own):
    mlflow = pytest.importorskip("mlflow")
    uri = f"file:{tmp_path}/files" if own else f"sqlite:///{tmp_path}/run/mlflow.db"
    keep_run(tmp_path, "mlflow", MLFLOW_ALLOW_FILE_STORE="true", **({"MLFLOW_TRACKING_URI": uri} if own else {}))

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 asks for this word
    client = mlflow.MlflowClient(tracking_uri=uri)
    [run] = client.search_runs([client.get_experiment_by_name("megatron-rl").experiment_id])
    assert run.info.run_name == "run"
    assert run.data.params == {"train.steps": "2"}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "reward_mean")] == [
        (0, 0.5),
        (1, 0.5),
    ]


def test_trackio_itself_keeps_every_step(tmp_path):
    [database] = (keep_run(tmp_path, "trackio") / "trackio").glob("*.db")
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    assert [(step, json.loads(metrics)["reward_mean"]) for step, metrics in rows] == [(0, 0.5), (1, 0.5)]


def test_a_sink_without_its_package_is_found_before_the_run(monkeypatch):
    monkeypatch.setattr("megatron_rl.observability.sinks.find_spec", lambda name: None)

    found = dict(missing_packages(Log(sinks=("wandb",), prometheus_port=0)))

    assert set(found) == {"wandb", "prometheus"}
    assert "pip install 'megatron-rl[track]'" in found["wandb"]


def test_only_the_phases_and_steps_asked_for_are_traced(tmp_path):
    recorder = RunRecorder(None, 3, traces=Traces(tmp_path, [1], rank=4))
    for step in range(3):
        for phase in ("rollout", "train"):
            with recorder.phase(phase):
                pass
        recorder.write(step, {})

    assert [path.name for path in tmp_path.iterdir()] == ["step_000001_train_rank_4.json.gz"]
