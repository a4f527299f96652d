"""Where batches come from: on the main rank the fleet, the task and the journal of samples; elsewhere the main rank.

The two classes have the same methods, and each call is collective, so that the loop never asks which rank it is.
"""

import signal
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Protocol

from megatron_rl.config.schema import Run, Sampling
from megatron_rl.data.prompts import first_prompts
from megatron_rl.data.types import Batch, Group, Prompt
from megatron_rl.parallel.mesh import World
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.tasks.base import Task, Verdict
from megatron_rl.train.collect import collect, share
from megatron_rl.train.fleet import Weights, write_own, writes_shares
from megatron_rl.train.journal import Journal
from megatron_rl.train.routes import wanted_routes
from megatron_rl.train.witness import Witness


class Sampler(Protocol):
    """A source of batches that is kept up to date with the weights."""

    def sample(self, step: int) -> Batch | None:
        """Return the batch of a step on every rank; None if the run was asked to stop."""
        ...

    def evaluates(self, step: int) -> bool:
        """Return whether an evaluation is due before this step."""
        ...

    def evaluate(self, step: int) -> tuple[float, int] | None:
        """Return the accuracy on held-out prompts and how many there were; None elsewhere, or if asked to stop."""
        ...

    def name_of(self, sample_index: int) -> str | None:
        """Return the id of a sample of the newest step, by its place in the step; None on the other ranks."""
        ...

    def compare(self, step: int, scored: Sequence[Batch]) -> None:
        """Explain the gap between the engine's log-probs and the trainer's."""
        ...

    def load(self, weights: Weights, version: int) -> None:
        """Bring new weights to the fleet."""
        ...

    def state(self) -> dict[str, object]:
        """Return what a checkpoint must keep of the sampler, as JSON; nothing on the other ranks."""
        ...

    def load_state(self, state: Mapping[str, object]) -> None:
        """Go on from what ``state`` gave."""
        ...


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Each asks the run to end after its step; srun hands on the last one only."""


class StopRequested(BaseException):
    """A signal to stop arrived while the fleet was sampling; no batch was lost, none was begun."""


def is_due(run: Run, step: int) -> bool:
    """Return whether ``evaluate.every`` asks for an evaluation before this step, or after the last."""
    every = run.evaluate.every
    return every > 0 and (step % every == 0 or step == run.train.steps)


class MainSampler:
    """Samples with the fleet, verifies, and shares the batch."""

    def __init__(self, run: Run, world: World, fleet: Fleet, task: Task, journal: Journal, witness: Witness) -> None:
        self.run, self.world, self.fleet, self.task, self.journal = run, world, fleet, task, journal
        self.witness = witness
        self.groups: Sequence[Group] = ()
        self._prompts = task.prompts("train", run.train.seed)
        evaluated = run.evaluate.prompts if run.evaluate.every else 0
        self._heldout = first_prompts(task.prompts("heldout", run.train.seed), evaluated) if evaluated else ()
        self._next_prompt = 0
        self._stop = False
        self._sampling = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True
        if self._sampling:
            raise StopRequested

    def sample(self, step: int) -> Batch | None:
        """See ``Sampler``."""
        return share(self._sample(step), self.world)

    def _sample(self, step: int) -> Batch | None:
        train = self.run.train
        places = range(self._next_prompt, self._next_prompt + train.prompts_per_step)
        prompts = tuple(self._prompts[place] for place in places)
        seed = (train.seed, step)
        groups = self._generate(prompts, train.group_size, self.run.rollout.sampling, seed, version=step)
        if groups is None:
            return None
        self.groups, self._next_prompt = groups, places.stop
        verdicts = self._verify(groups)
        if self.run.log.rollouts:
            self.journal.rollouts(step, groups, verdicts)
        return collect(groups, verdicts, self.run)

    def _generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling, seed: tuple[int, ...], version: int
    ) -> list[Group] | None:
        """Return the groups; None if a stop is asked for before they are there."""
        try:
            self._sampling = True
            routes = wanted_routes(self.run)
            return None if self._stop else self.fleet.generate(prompts, group_size, sampling, seed, version, routes)
        except StopRequested:
            return None
        finally:
            self._sampling = False

    def _verify(self, groups: Iterable[Group]) -> list[list[Verdict]]:
        return [[self.task.verify(group.prompt, response) for response in group.responses] for group in groups]

    def evaluates(self, step: int) -> bool:
        """See ``Sampler``."""
        return is_due(self.run, step)

    def evaluate(self, step: int) -> tuple[float, int] | None:
        """See ``Sampler``."""
        settings = self.run.evaluate
        sampling = self.run.rollout.sampling.model_copy(update={"temperature": settings.temperature})
        seed = (self.run.train.seed, step, EVALUATION)
        groups = self._generate(self._heldout, 1, sampling, seed, step)
        if groups is None:
            return None
        correct = [verdict.correct for verdicts in self._verify(groups) for verdict in verdicts]
        return sum(correct) / len(correct), len(correct)

    def name_of(self, sample_index: int) -> str | None:
        """See ``Sampler``."""
        return [response.id for group in self.groups for response in group.responses][sample_index]

    def compare(self, step: int, scored: Sequence[Batch]) -> None:
        """See ``Sampler``."""
        verdict = self.witness.compare(step, self.groups, Batch.join(scored))
        if verdict is not None:
            self.journal.say(verdict)

    def load(self, weights: Weights, version: int) -> None:
        """See ``Sampler``."""
        self.fleet.update(weights.own() if writes_shares(self.run, self.world) else weights, version)

    def state(self) -> dict[str, object]:
        """See ``Sampler``."""
        return {"next_prompt": self._next_prompt}

    def load_state(self, state: Mapping[str, object]) -> None:
        """See ``Sampler``."""
        self._next_prompt = int(str(state["next_prompt"]))


EVALUATION = 0x6576616C
"""Keeps the sampling seeds of an evaluation apart from those of training."""


class FollowingSampler:
    """Receives what the main rank shares, and helps it gather the weights."""

    def __init__(self, run: Run, world: World) -> None:
        self.run, self.world = run, world
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def sample(self, step: int) -> Batch | None:
        """See ``Sampler``."""
        return share(None, self.world)

    def evaluates(self, step: int) -> bool:
        """See ``Sampler``."""
        return is_due(self.run, step)

    def evaluate(self, step: int) -> tuple[float, int] | None:
        """See ``Sampler``."""

    def name_of(self, sample_index: int) -> str | None:
        """See ``Sampler``."""

    def compare(self, step: int, scored: Sequence[Batch]) -> None:
        """See ``Sampler``."""

    def load(self, weights: Weights, version: int) -> None:
        """See ``Sampler``."""
        if writes_shares(self.run, self.world):
            write_own(self.run, self.world, weights, version)
        else:
            for _ in weights:
                pass

    def state(self) -> dict[str, object]:
        """See ``Sampler``."""
        return {}

    def load_state(self, state: Mapping[str, object]) -> None:
        """See ``Sampler``."""
