"""What a run tells: ``metrics.jsonl`` and ``rollouts.jsonl`` to programs, ``console.log`` and a table to people."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from megatron_rl.data.types import Group, Prompt, Response
from megatron_rl.observability.console import Board
from megatron_rl.observability.file_names import CONFIG, CONSOLE, LEDGER, METRICS, MISMATCH, ROLLOUTS, TOKENS
from megatron_rl.observability.run_folder import keep_steps_before
from megatron_rl.observability.sinks import Read, Sink, flat
from megatron_rl.tasks.base import Verdict

DOCUMENTED: Mapping[str, str] = {
    "step": "rollout batch, from 0; the line of the last evaluation alone has the number of steps",
    "weight_version": "version of the weights that the step trains: one more for each step",
    "reward_mean": "mean reward of the verified responses",
    "reward_std": "standard deviation of their rewards over the batch",
    "unverified_fraction": "responses for which the verifier gave no reward",
    "unverified_declined": "responses whose verifier returned None; this and the next three over all groups sampled",
    "unverified_raised": "responses whose verifier raised an exception or died",
    "unverified_timed_out": "responses whose verifier took longer than reward.seconds",
    "unverified_invalid": "responses whose verifier returned NaN, infinity or no number",
    "unverified_environment": "responses whose environment failed",
    "reward/NAME": "mean of each reward without its weight, where there are several",
    "response_tokens_mean": "sampled tokens of a response, stop token included",
    "truncated_fraction": "responses that reached rollout.sampling.max_new_tokens",
    "zero_variance_fraction": "prompts whose responses all have the same reward, and so teach nothing",
    "loss": "what was minimised, mean over the step's updates",
    "entropy_mean": "nats a trained token, of the policy at the start of the step",
    "ratio_mean": "mean importance ratio over trained tokens",
    "ratio_max": "largest importance ratio",
    "first_ratio_max": "the same in the first update alone, where every ratio must be 1",
    "clipped_fraction": "trained tokens without a gradient because of the clip",
    "gradient_fraction": "trained tokens with a gradient: not clipped, and neither advantage nor weight is 0",
    "gradient_kept": "sum of |d loss / d log-prob| over trained tokens, as a share of the plain policy gradient's",
    "segments_mean": "segments (tokens that share a ratio) of a response",
    "policy_kl_mean": "k3 estimate of KL(old || current), nats a token",
    "reference_kl_mean": "k3 estimate of KL(current || reference), where one is used",
    "correction_mean": "mean weight against the rollout mismatch, where one is used",
    "mismatch_kl": "k3 estimate of KL(rollout || trainer) on the sampled tokens, nats a token",
    "mismatch_p50": "median of the absolute difference of the two log-probs",
    "mismatch_p90": "90th percentile of it",
    "mismatch_p99": "99th percentile of the absolute difference of the two log-probs",
    "mismatch_max": "largest absolute difference of the two log-probs",
    "routing_differs_tokens": "tokens that engine and trainer sent to other experts in any layer, where both are known",
    "routing_differs_layers": "the same over pairs of a token and a layer with experts",
    "routing_missing_tokens": "tokens whose experts the engine should have returned and did not: the live router chose",
    "grad_norm": "global gradient norm before clipping, mean over the step's updates",
    "lr": "learning rate of the last update",
    "tokens": "prompt and response tokens of the batch",
    "lag_mean": "weight versions that a trained token is older than the weights of its step, mean over tokens",
    "lag_max": "the largest of them",
    "mixed_versions_fraction": "responses whose tokens come from more than one version of the weights",
    "groups_no_signal": "groups whose rewards are all equal, of all that were sampled for the step",
    "groups_surplus": "groups left over when the batch was full; train.oversample, train.max_resample_rounds",
    "groups_too_old": "groups sampled again because a token was older than rollout.max_lag allows",
    "refills": "resampling rounds: how many times more prompts were requested to replace groups without a signal",
    "seconds": "wall time of each phase, of the step as ``total``, and ``fleet``: how long a server had work meanwhile",
    "accuracy": "share of the responses to held-out prompts that are right, mean over prompts; only where evaluated",
    "evaluated_prompts": "held-out prompts behind ``accuracy``",
}
"""Every key of ``metrics.jsonl``. A number that is not finite is written as null."""

Metric = float | int | None


class RunRecorder:
    """Writes a run's records. Made without a folder, as on all ranks but one, it only times.

    Lines of ``step`` and later that an earlier run left are dropped, so that a resumed run repeats none.
    """

    def __init__(
        self,
        folder: Path | None,
        total_steps: int,
        step: int = 0,
        *,
        sinks: Sequence[Sink] = (),
        traces: Callable[[int, str], AbstractContextManager[object]] = lambda step, phase: nullcontext(),
        terminal: bool | None = None,
    ) -> None:
        self.folder, self._sinks, self._traces, self._step = folder, sinks, traces, step
        self.board = Board(total_steps, terminal=terminal) if folder else None
        self._seconds: dict[str, float] = {}
        self._began: float | None = None  # the first phase begins the first step
        self._files: dict[str, TextIO] = {}
        if folder:
            for name in (METRICS, ROLLOUTS, TOKENS, LEDGER):
                keep_steps_before(folder / name, step)
            self._files = {name: _appending(folder / name) for name in (METRICS, ROLLOUTS, LEDGER, CONSOLE)}

    def __enter__(self) -> "RunRecorder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a ``with`` block to the phase of this name."""
        began = time.perf_counter()
        self._began = began if self._began is None else self._began
        if self.board:
            self.board.doing(name)
        try:
            with self._traces(self._step, name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def note(self, name: str, seconds: float) -> None:
        """Add a time that is measured elsewhere, and overlaps with the phases."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def write(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """End a step: write its line, show its row, and begin to time the next."""
        unknown = sorted(name for name in set(metrics) - set(DOCUMENTED) if not name.startswith("reward/"))
        assert not unknown, f"metrics without documentation: {unknown}; add them to journal.DOCUMENTED"
        now = time.perf_counter()
        seconds = {name: round(value, 4) for name, value in self._seconds.items()}
        seconds["total"] = round(now - (self._began or now), 4)
        self._seconds.clear()
        self._began, self._step = now, step + 1
        if self.board is None:
            return
        self._line(METRICS, {"step": step, **{k: _finite(v) for k, v in metrics.items()}, "seconds": seconds})
        for line in self.board.row(step, metrics, seconds):
            self._log(line)
        for sink in self._sinks:
            sink.write(step, flat(metrics, seconds))

    def rollouts(self, step: int, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> None:
        """Write every sample of a step with its reward."""
        if self.folder is None:
            return
        for group, group_verdicts in zip(groups, verdicts, strict=True):
            for response, verdict in zip(group.responses, group_verdicts, strict=True):
                record = sample_record(group.prompt, response, verdict)
                self._line(ROLLOUTS, {"step": step, **record, "weight_versions": response.weight_versions})
        self._files[ROLLOUTS].flush()

    def tokens(self, record: Mapping[str, object]) -> None:
        """Write what became of a step's tokens; see ``train.tokens``."""
        if self.folder is None:
            return
        if TOKENS not in self._files:
            self._files[TOKENS] = _appending(self.folder / TOKENS)
        self._line(TOKENS, record)
        self._files[TOKENS].flush()

    def ledger(self, entries: Iterable[Mapping[str, object]]) -> None:
        """Write what became of the groups of a step; see ``train.ledger``."""
        if self.folder is None:
            return
        for entry in entries:
            self._line(LEDGER, entry)
        self._files[LEDGER].flush()

    def watch(self, read: Read) -> None:
        """Let the sinks ask how the run stands."""
        for sink in self._sinks:
            sink.watch(read)

    def say(self, message: str) -> None:
        """Show a line to people."""
        if self.board:
            self.board.say(message)
            self._log(message)

    def close(self) -> None:
        """End the live table and close the files."""
        if self.board:
            self.board.close()
        for file in self._files.values():
            file.close()
        for sink in self._sinks:
            sink.close()
        self._files = {}
        self._sinks = ()

    def _line(self, name: str, record: Mapping[str, object]) -> None:
        self._files[name].write(json.dumps(record, allow_nan=False) + "\n")
        if name == METRICS:
            self._files[name].flush()

    def _log(self, line: str) -> None:
        self._files[CONSOLE].write(f"{time.strftime('%H:%M:%S')} {line}\n")
        self._files[CONSOLE].flush()


def sample_record(prompt: Prompt, response: Response, verdict: Verdict) -> dict[str, object]:
    """Return a sample with its reward, as JSON."""
    return {
        "id": response.id,
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "response": response.text,
        "reward": verdict.score,
        "rewards": dict(verdict.rewards),
        "correct": verdict.correct,
        "reason": verdict.reason,
        "finish_reason": response.finish_reason,
        "tokens": len(response.output_ids),
    }


def _appending(path: Path) -> TextIOWrapper:
    return path.open("a", encoding="utf-8")


def _finite(value: Metric) -> Metric:
    return value if value is None or math.isfinite(value) else None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]


def farewell(folder: Path, *, resumable: bool) -> list[str]:
    """Return how a run went, where it is and how to look at it, in words."""
    contents = {
        METRICS: "one JSON object a step",
        ROLLOUTS: "every sample with its reward",
        TOKENS: "tokens and segments of a few samples a step, for megatron-rl report",
        CONSOLE: "the lines above, with the time of day",
        MISMATCH: "the tokens on which engine and trainer agree least, newest step",
        CONFIG: "all settings",
        "export": "the trained model, a Hugging Face checkpoint",
    }
    lines = []
    accuracies = [line["accuracy"] for line in read_metrics(folder) if "accuracy" in line]
    if accuracies:
        lines.append(f"accuracy on held-out prompts: {accuracies[0]:.3f} at first, {accuracies[-1]:.3f} at last")
    lines.append(f"run folder: {folder}")
    lines += [f"  {name:15} {words}" for name, words in contents.items() if (folder / name).exists()]
    if resumable:
        lines.append("to continue it: the same command with train.resume=true")
    return lines
