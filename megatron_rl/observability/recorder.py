"""The records of a run: metrics, samples, tokens and the group ledger as JSON lines, and messages on the console."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from megatron_rl.algorithms.loss import GATE, MEASURE
from megatron_rl.data.minibatch import Minibatch
from megatron_rl.data.step import StepReport, StepSamples
from megatron_rl.data.types import Batch, Metrics
from megatron_rl.distributed.replicas import Replicas
from megatron_rl.errors import TrainingError
from megatron_rl.observability.console import ConsoleHandler, ConsoleTable
from megatron_rl.observability.disk import AppendedFile, unwritable
from megatron_rl.observability.file_names import CONFIG, CONSOLE, LEDGER, METRICS, MISMATCH, ROLLOUTS, TOKENS, WARNINGS
from megatron_rl.observability.learning_watch import LearningWatch
from megatron_rl.observability.metric_keys import METRIC_KEYS
from megatron_rl.observability.mismatch_causes import LogprobGaps
from megatron_rl.observability.mismatch_report import MismatchReport
from megatron_rl.observability.routing_statistics import routing_counts
from megatron_rl.observability.run_folder import keep_steps_before
from megatron_rl.observability.sinks import ReadGauges, Sink, flat
from megatron_rl.observability.step_metrics import StepMetrics, entropy_parts
from megatron_rl.observability.token_record import TokenRecord
from megatron_rl.util.logs import logging_to

log = logging.getLogger(__name__)

Metric = float | int | None


class RunRecorder:
    """Records a run. Every rank has one: the first rank of each replica computes records of its own responses, the main
    rank merges and writes them, and the others only measure the time of phases.

    While it is open it shows the log messages of the package on the console and writes them to ``console.log``.

    Args:
        folder: the run folder, on the main rank; lines of ``step`` and later steps, left by an earlier run, are removed
            from its files.
        total_steps: number of steps of the run.
        step: the first step.
        replicas: the data-parallel replicas, on the first rank of each; None on the other ranks.
        route_layers: number of the model's layers with experts.
        mismatch: writes ``mismatch.json``.
        tokens: makes the lines of ``tokens.jsonl``.
        watch: finds out that a run learns nothing.
        sinks: trackers that receive the metrics.
        traces: profiles a phase of a step.
        terminal: whether the console is a terminal; None: detect it.
    """

    def __init__(
        self,
        folder: Path | None,
        total_steps: int,
        step: int = 0,
        *,
        replicas: Replicas | None = None,
        route_layers: int = 1,
        mismatch: MismatchReport | None = None,
        tokens: TokenRecord | None = None,
        watch: LearningWatch | None = None,
        sinks: Sequence[Sink] = (),
        traces: Callable[[int, str], AbstractContextManager[object]] = lambda step, phase: nullcontext(),
        terminal: bool | None = None,
    ) -> None:
        self.folder, self._sinks, self._traces, self._step = folder, sinks, traces, step
        self._replicas, self._route_layers = replicas, route_layers
        self._mismatch, self._tokens, self._watch = mismatch, tokens, watch
        self._metrics, self._samples = StepMetrics(), StepSamples()
        self._seconds: dict[str, float] = {}
        self._clocks: dict[str, tuple[Callable[[], float], float]] = {}
        self._began: float | None = None  # the first step begins with the first phase
        self._files: dict[str, AppendedFile] = {}
        self._table: ConsoleTable | None = None
        self._console: ConsoleHandler | None = None
        self._logging = ExitStack()
        if folder:
            for name in (METRICS, ROLLOUTS, TOKENS, LEDGER, WARNINGS):
                keep_steps_before(folder / name, step)
            self._files = {name: AppendedFile(folder / name) for name in (METRICS, ROLLOUTS, LEDGER, CONSOLE)}
            self._table = ConsoleTable(total_steps, step, terminal=terminal)
            self._console = ConsoleHandler(self._table.console, self._files[CONSOLE])
            self._logging.enter_context(logging_to(self._console))

    def __enter__(self) -> "RunRecorder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a ``with`` block to the phase of this name."""
        began = time.perf_counter()
        self._began = began if self._began is None else self._began
        if self._table:
            self._table.show_phase(name)
        try:
            with self._traces(self._step, name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def add_clock(self, name: str, read: Callable[[], float]) -> None:
        """Record under this name how much a clock advances per step: seconds that overlap with the phases."""
        self._clocks[name] = (read, 0.0)

    def register_gauges(self, read: ReadGauges) -> None:
        """Let the sinks, and the status line of the console, read gauges at any time."""
        if self._table:
            self._table.read_gauges = read
        for sink in self._sinks:
            sink.register(read)

    def evaluation(self, result: tuple[float, int] | None) -> None:
        """Record an accuracy and its number of prompts."""
        self._metrics.evaluation(result)

    def rollout(self, step: int, outline: Batch, samples: StepSamples) -> None:
        """Record the outline of a step and its samples."""
        if self.folder is None:
            return
        self._samples = samples
        self._write_text(ROLLOUTS, samples.lines)
        self._write_text(LEDGER, samples.ledger)
        self._metrics.rollout(step, outline, samples.counts)

    def logprobs(self, step: int, minibatches: Sequence[Minibatch]) -> None:
        """Record the log-probs and entropies of the old policy, and how far the rollout engine's differ."""
        if self._replicas is None:
            return
        gaps = LogprobGaps.of(minibatches, self._replicas)
        routing = routing_counts(minibatches, self._replicas, self._route_layers)
        self._metrics.logprobs(entropy_parts(minibatches, self._replicas), gaps.statistics, routing)
        if self._mismatch is None:
            return
        verdict = self._mismatch.compare(step, self._samples, minibatches, gaps, routing)
        if verdict is not None:
            log.info(verdict)

    def update(self, minibatch: Minibatch, metrics: Metrics, report: StepReport) -> None:
        """Record an optimizer step: its mini-batch, the metrics of its loss, and its report."""
        if self._replicas is None:
            return
        self._metrics.update(metrics, report)
        if self._tokens and metrics.tokens:
            self._tokens.add(minibatch.add(metrics.tokens))

    def sample_id(self, index: int) -> str | None:
        """Return the id of a response of the newest step by its ``sample_index_B``; None on the other ranks."""
        return self._samples.read([index])[0].id if self._samples.output_tokens else None

    def finish_step(self, step: int) -> None:
        """Write the tokens and metrics of a step, and start to time the next one."""
        if self._tokens and self._tokens.updates and (line := self._tokens.take(step, self._samples)) is not None:
            self._write_lines(TOKENS, [line])
        metrics, self._metrics = self._metrics.summary(), StepMetrics()
        self.write(step, metrics)

    def write(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Write the metrics of a step to the file, the table and the sinks."""
        families = ("reward/", MEASURE, GATE)
        unknown = sorted(name for name in set(metrics) - set(METRIC_KEYS) if not name.startswith(families))
        assert not unknown, f"metrics without documentation: {unknown}; add them to METRIC_KEYS"
        now = time.perf_counter()
        seconds = {name: round(value, 4) for name, value in (self._seconds | self._read_clocks()).items()}
        seconds["total"] = round(now - (self._began or now), 4)
        self._seconds.clear()
        self._began, self._step = now, step + 1
        if self._table is None or self._console is None:
            return
        if self.folder is not None and not self._files[METRICS].is_there:
            raise TrainingError(unwritable(self.folder, f"{METRICS} was deleted, moved or replaced"))
        line = {"step": step, **{name: _finite(value) for name, value in metrics.items()}, "seconds": seconds}
        self._write_lines(METRICS, [line])
        for row in self._table.add_row(step, metrics, seconds):
            self._console.append(row)
        for cause, warning in (self._watch.warnings(metrics) if self._watch else {}).items():
            log.warning(warning)
            self._write_lines(WARNINGS, [{"step": step, "cause": cause, "warning": warning}])
        for sink in self._sinks:
            sink.write(step, flat(metrics, seconds))

    def summarize(self, *, resumable: bool) -> None:
        """End the status line, and say how the run went and where its files are."""
        if self.folder is not None and self._table is not None:
            self._table.close()
            for line in run_summary(self.folder, resumable=resumable):
                log.info(line)

    def close(self) -> None:
        """Close the sinks, the table and the files."""
        for sink in self._sinks:
            sink.close()
        if self._table:
            self._table.close()
        self._logging.close()
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._sinks = ()

    def _read_clocks(self) -> dict[str, float]:
        now = {name: read() for name, (read, _) in self._clocks.items()}
        advanced = {name: now[name] - before for name, (_, before) in self._clocks.items()}
        self._clocks = {name: (read, now[name]) for name, (read, _) in self._clocks.items()}
        return advanced

    def _write_lines(self, name: str, records: Iterable[Mapping[str, object]]) -> None:
        self._write_text(name, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))

    def _write_text(self, name: str, text: str) -> None:
        if self.folder is None:
            return
        if name not in self._files:  # tokens.jsonl and warnings.jsonl exist only if they have a line
            self._files[name] = AppendedFile(self.folder / name)
        self._files[name].write(text)


def _finite(value: Metric) -> Metric:
    return value if value is None or math.isfinite(value) else None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]


def run_summary(folder: Path, *, resumable: bool) -> list[str]:
    """Return the lines that end a run: its accuracy, its files, and how to continue it."""
    contents = {
        METRICS: "one JSON object per step",
        ROLLOUTS: "every sample with its reward",
        TOKENS: "tokens and segments of a few samples per step, for megatron-rl report",
        CONSOLE: "the lines above, with the time of day",
        WARNINGS: "causes for which the run may learn nothing",
        MISMATCH: "the tokens of the newest step on which engine and trainer differ most",
        CONFIG: "all settings",
        "export": "the trained model, a Hugging Face checkpoint",
    }
    lines = []
    accuracies = [line["accuracy"] for line in read_metrics(folder) if "accuracy" in line]
    if accuracies:
        lines.append(f"accuracy on held-out prompts: {accuracies[0]:.3f} at the start, {accuracies[-1]:.3f} at the end")
    lines.append(f"run folder: {folder}")
    lines += [f"  {name:15} {content}" for name, content in contents.items() if (folder / name).exists()]
    if resumable:
        lines.append(f"to continue it: megatron-rl train {folder} (or the same command with train.resume=true)")
    return lines
