"""Where else a run's metrics go: trackers chosen by name, and an endpoint that Prometheus reads. None is needed.

All keep their data in the run folder unless the environment names a server, so that they work without a network.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from megatron_rl.config.schema import Log
from megatron_rl.observability.gauges import Snapshot

log = logging.getLogger(__name__)

PACKAGES: Mapping[str, str] = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "prometheus": "prometheus_client",
}
"""The module that each sink imports."""

Read = Callable[[], Iterable[Snapshot]]
"""Tells how a run stands at the moment."""

PREFIX = "megatron_rl_"
"""Of the gauges that Prometheus sees."""


class Sink(Protocol):
    """Takes the numbers of a step."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take a step's numbers; times are named ``seconds/PHASE``."""
        ...

    def watch(self, read: Read) -> None:
        """Ask this whenever somebody wants to know how the run stands between two steps."""
        ...

    def close(self) -> None:
        """Finish what is not sent yet."""
        ...


def missing_packages(settings: Log) -> Iterator[tuple[str, str]]:
    """Yield each sink that is asked for and whose package is not installed, and what to write."""
    for name in asked(settings):
        if find_spec(PACKAGES[name]) is None:
            yield name, f"needs the package {PACKAGES[name]}: pip install 'megatron-rl[track]', or leave it out"


def asked(settings: Log) -> tuple[str, ...]:
    """Return the names of all sinks of a run."""
    return (*settings.sinks, *(["prometheus"] if settings.prometheus_port is not None else []))


def open_sinks(settings: Log, config: Mapping[str, object]) -> list[Sink]:
    """Return the sinks of a run; ``config`` is what trackers show as its settings."""
    folder = Path(settings.path).absolute()
    makers: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: _TensorBoard(folder),
        "wandb": lambda: _Wandb(folder, settings.project, config),
        "mlflow": lambda: _MLflow(folder, settings.project, config),
        "trackio": lambda: _Trackio(folder, settings.project, config),
        "prometheus": lambda: Prometheus(settings.prometheus_port or 0, settings.prometheus_host),
    }
    return [FaultTolerantSink(name, makers[name]()) for name in asked(settings)]


def flat(metrics: Mapping[str, object], seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers of a step under one level of names; what is not a number is left out."""
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    return numbers | {f"seconds/{name}": value for name, value in seconds.items()}


class FaultTolerantSink:
    """A sink that may fail without harm to the run: it is told of once, and not asked again."""

    def __init__(self, name: str, sink: Sink) -> None:
        self._name, self._sink, self._works = name, sink, True

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """See ``Sink``."""
        self._guarded(lambda: self._sink.write(step, numbers))

    def watch(self, read: Read) -> None:
        """See ``Sink``."""
        self._guarded(lambda: self._sink.watch(read))

    def close(self) -> None:
        """See ``Sink``."""
        self._guarded(self._sink.close)

    def _guarded(self, call: Callable[[], None]) -> None:
        if not self._works:
            return
        try:
            call()
        # Trackers raise errors of their own on top of these two; all derive from one of them.
        except (OSError, RuntimeError, ValueError) as error:
            self._works = False
            log.warning("log.sinks: %s failed and gets no more metrics: %s", self._name, error)


class _Tracker:
    def watch(self, read: Read) -> None:
        """Trackers get steps only."""


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
        # One name for every start of a run: a resumed one goes on in the same curve.
        names = {"project": project, "name": folder.name, "id": folder.name}
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
        self._mlflow.start_run(run_name=folder.name)
        # A parameter of MLflow is one line of at most 500 characters.
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
    """Serves the newest step's numbers on ``/metrics``, and how the run stands when asked.

    Args:
        port: 0 takes a free one.
        host: address to listen on.
    """

    def __init__(self, port: int, host: str) -> None:
        self._client: Any = importlib.import_module("prometheus_client")
        self._registry = self._client.CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._server, self._thread = self._client.start_http_server(port, addr=host, registry=self._registry)

    @property
    def port(self) -> int:
        """Where it answers."""
        return int(self._server.server_port)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """See ``Sink``."""
        for name, value in {"step": float(step), **numbers}.items():
            known = self._gauges.get(name)
            if known is None:
                safe, words = PREFIX + name.replace("/", "_"), f"{name}, newest step"
                known = self._gauges[name] = self._client.Gauge(safe, words, registry=self._registry)
            known.set(value)

    def watch(self, read: Read) -> None:
        """See ``Sink``; read anew for every request, in the endpoint's thread."""
        self._registry.register(_Live(read))

    def close(self) -> None:
        """See ``Sink``."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Live:
    """A collector as prometheus_client asks for them."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._family: Any = importlib.import_module("prometheus_client.core").GaugeMetricFamily

    def collect(self) -> Iterator[object]:
        """Yield the gauges, those of one name together."""
        families: dict[str, Any] = {}
        for reading in self._read():
            if reading.name not in families:
                name, labels = PREFIX + reading.name, list(reading.labels)
                families[reading.name] = self._family(name, reading.words, labels=labels)
            families[reading.name].add_metric(list(reading.labels.values()), reading.value)
        yield from families.values()

    def describe(self) -> list[object]:
        """Return nothing: what there is, is known when asked."""
        return []
