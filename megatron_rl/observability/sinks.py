"""Sinks receive the metrics of a run: trackers chosen by name, and an endpoint that Prometheus reads.

Trackers keep their data in the run folder unless the environment names a server, so they work without a network.
"""

import contextlib
import importlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from megatron_rl.config.schema import Log
from megatron_rl.observability.file_names import METRICS
from megatron_rl.util.atomic import replace_text

log = logging.getLogger(__name__)

PACKAGES: Mapping[str, str] = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "prometheus": "prometheus_client",
}
"""Sink -> the module that it imports."""

ReadGauges = Callable[[], Iterable[tuple[str, str, float, Mapping[str, str]]]]
"""Returns the current gauges: name, description, value, and labels that distinguish gauges of the same name."""

PREFIX = "megatron_rl_"
"""Prefix of the names of Prometheus gauges."""


class Sink(Protocol):
    """Receives the metrics of a run."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the metrics of a step; times are named ``seconds/PHASE``."""
        ...

    def register(self, read: ReadGauges) -> None:
        """Read gauges with this function whenever they are requested."""
        ...

    def close(self) -> None:
        """Send what is not sent yet, and release resources."""
        ...


def missing_packages(settings: Log) -> Iterator[tuple[str, str]]:
    """Yield the name of each configured sink whose package is not installed, and what to do about it."""
    for name in sink_names(settings):
        if find_spec(PACKAGES[name]) is None:
            yield name, f"needs the package {PACKAGES[name]}: pip install 'megatron-rl[track]', or leave it out"


def sink_names(settings: Log) -> tuple[str, ...]:
    """Return the names of the configured sinks."""
    return (*settings.sinks, *(["prometheus"] if settings.prometheus_port is not None else []))


def open_sinks(settings: Log, config: Mapping[str, object]) -> list[Sink]:
    """Return the configured sinks; ``config`` has the settings that trackers show."""
    folder = Path(settings.path).absolute()
    factories: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: _TensorBoard(folder),
        "wandb": lambda: _Wandb(folder, settings.project, config),
        "mlflow": lambda: _MLflow(folder, settings.project, config),
        "trackio": lambda: _Trackio(folder, settings.project, config),
        "prometheus": lambda: Prometheus(settings.prometheus_port or 0, settings.prometheus_host),
    }
    shown = last_step(folder / METRICS)
    sinks: list[Sink] = []
    for name in sink_names(settings):
        # A resumed run repeats the steps after its checkpoint, with the same numbers.
        sinks.append(FaultTolerantSink(name, factories[name], shown if name != "prometheus" else -1))
    return sinks


def last_step(metrics: Path) -> int:
    """Return the last step that an earlier start of this run wrote; -1 if there is none."""
    steps = [-1]
    if metrics.exists():
        for line in metrics.read_bytes().splitlines():
            with contextlib.suppress(ValueError, LookupError, TypeError):  # a crash may leave half a line
                steps.append(int(json.loads(line)["step"]))
    return max(steps)


def flat(metrics: Mapping[str, object], seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers of a step with flat names; values that are not numbers are omitted."""
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    return numbers | {f"seconds/{name}": value for name, value in seconds.items()}


_ERRORS = (OSError, RuntimeError, ValueError, TypeError, AttributeError, ImportError, LookupError)


def errors_of(name: str) -> tuple[type[Exception], ...]:
    """Return what a tracker raises: common errors, and the base of its own, which is a plain Exception."""
    places = {"wandb": ("wandb.errors", "Error"), "mlflow": ("mlflow.exceptions", "MlflowException")}
    if name not in places:
        return _ERRORS
    module, error = places[name]
    try:
        return (*_ERRORS, getattr(importlib.import_module(module), error))
    except _ERRORS:
        return _ERRORS


class FaultTolerantSink:
    """Opens and wraps a sink. The first failure is logged and disables the sink; training continues."""

    def __init__(self, name: str, make: Callable[[], Sink], shown: int = -1) -> None:
        """Open the sink.

        Args:
            name: name of the sink, for messages.
            make: opens the sink.
            shown: last step that it has already; this step and earlier ones are not sent again.
        """
        self._name, self._shown, self._works = name, shown, True
        self._sink: Sink | None = None

        def open_sink() -> None:
            self._sink = make()

        self._call(open_sink, "could not be opened")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        if step > self._shown and (sink := self._sink) is not None:
            self._call(lambda: sink.write(step, numbers))

    def register(self, read: ReadGauges) -> None:
        """Register a function that reads gauges."""
        if (sink := self._sink) is not None:
            self._call(lambda: sink.register(read))

    def close(self) -> None:
        """Close the sink."""
        if (sink := self._sink) is not None:
            self._call(sink.close)

    def _call(self, call: Callable[[], None], problem: str = "failed") -> None:
        if not self._works:
            return
        try:
            call()
        except errors_of(self._name) as error:
            self._works = False
            log.warning("log.sinks: %s %s and gets no more metrics: %s", self._name, problem, error)


class _Tracker:
    def register(self, read: ReadGauges) -> None:
        """Do nothing: trackers receive steps only."""


class _TensorBoard(_Tracker):
    def __init__(self, folder: Path) -> None:
        self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb(_Tracker):
    def __init__(self, folder: Path, project: str, config: Mapping[str, object]) -> None:
        wandb = importlib.import_module("wandb")
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        # The same id for every start of a run, so that a resumed run continues its curves.
        saved = folder / "wandb_run"
        if not saved.exists():
            replace_text(saved, f"{folder.name[:64]}-{uuid.uuid4().hex[:8]}\n")
        names = {"project": project, "name": folder.name, "id": saved.read_text(encoding="utf-8").strip()}
        self._run = wandb.init(**names, dir=str(folder), config=dict(config), mode=mode, resume="allow")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow(_Tracker):
    def __init__(self, folder: Path, project: str, config: Mapping[str, object]) -> None:
        self._mlflow = importlib.import_module("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self._mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        self._mlflow.set_experiment(project)
        saved = folder / "mlflow_run"
        if saved.exists():
            self._mlflow.start_run(run_id=saved.read_text(encoding="utf-8").strip())
            return  # the parameters of a run cannot be changed
        run = self._mlflow.start_run(run_name=folder.name)
        replace_text(saved, f"{run.info.run_id}\n")
        # MLflow limits the value of a parameter to 500 characters.
        self._mlflow.log_params({name: str(value)[:500] for name, value in config.items()})

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio(_Tracker):
    def __init__(self, folder: Path, project: str, config: Mapping[str, object]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
        self._trackio = importlib.import_module("trackio")
        self._trackio.init(project=project, name=folder.name, config=dict(config), resume="allow")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._trackio.log(dict(numbers), step=step)

    def close(self) -> None:
        self._trackio.finish()


class Prometheus:
    """Serves the metrics of the newest step and the current gauges on ``/metrics``.

    Args:
        port: port to listen on; 0 chooses a free one.
        host: address to listen on.
    """

    def __init__(self, port: int, host: str) -> None:
        self._client: Any = importlib.import_module("prometheus_client")
        self._registry = self._client.CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._server, self._thread = self._client.start_http_server(port, addr=host, registry=self._registry)

    @property
    def port(self) -> int:
        """The port that the endpoint listens on."""
        return int(self._server.server_port)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Set the gauges to the metrics of a step."""
        for name, value in {"step": float(step), **numbers}.items():
            known = self._gauges.get(name)
            if known is None:
                safe, description = PREFIX + name.replace("/", "_"), f"{name}, newest step"
                known = self._gauges[name] = self._client.Gauge(safe, description, registry=self._registry)
            known.set(value)

    def register(self, read: ReadGauges) -> None:
        """Read these gauges for every request, in the endpoint's thread."""
        self._registry.register(_GaugeCollector(read))

    def close(self) -> None:
        """Stop the endpoint."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _GaugeCollector:
    """A custom collector of prometheus_client."""

    def __init__(self, read: ReadGauges) -> None:
        self._read = read
        self._family: Any = importlib.import_module("prometheus_client.core").GaugeMetricFamily

    def collect(self) -> Iterator[object]:
        """Yield the gauges, grouped by name."""
        families: dict[str, Any] = {}
        for name, description, value, labels in self._read():
            if name not in families:
                families[name] = self._family(PREFIX + name, description, labels=list(labels))
            families[name].add_metric(list(labels.values()), value)
        yield from families.values()

    def describe(self) -> list[object]:
        """Return nothing, because the gauges are known only when they are read."""
        return []
