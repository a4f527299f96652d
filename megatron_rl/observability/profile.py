"""Traces of torch's profiler for selected steps; open them in https://ui.perfetto.dev or chrome://tracing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, supported_activities

PHASES = ("score", "train", "weights")
"""Phases that use the device."""


class Traces:
    """Traces the phases of selected steps on this rank to ``folder/step_N_PHASE_rank_R.json.gz``."""

    def __init__(self, folder: Path, steps: Sequence[int], rank: int) -> None:
        self._folder, self._steps, self._rank = folder, frozenset(steps), rank

    @contextmanager
    def __call__(self, step: int, phase: str) -> Iterator[None]:
        """Trace a ``with`` block if its step and phase are selected."""
        if step not in self._steps or phase not in PHASES:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        activities = supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA}
        with profile(activities=list(activities), record_shapes=True, profile_memory=True) as trace:
            yield
        trace.export_chrome_trace(str(self._folder / f"step_{step:06}_{phase}_rank_{self._rank}.json.gz"))
