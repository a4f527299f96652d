"""From samples to figures: over all prompts, by task, and by task and difficulty."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean

from megatron_rl.evaluate.result_folder import EvaluatedSample
from megatron_rl.evaluate.statistics import CONFIDENCE, Estimate, interval, majority_at_k, pass_at_k

METHOD = (
    f"{CONFIDENCE:.0%} Wilson intervals with the effective number of prompts (clustered by prompt) and Student's"
    " quantile; a sample without a verdict counts as wrong"
)


@dataclass(frozen=True)
class PromptCounts:
    """The samples of a prompt, counted."""

    prompt_id: str
    task: str
    difficulty: str
    samples: int
    correct: int
    unverified: int
    truncated: int
    tokens: int
    wrong_votes: tuple[int, ...]
    """Samples of each wrong answer, in any order."""
    blank: int
    """Samples that voted for nothing."""
    votes_known: bool
    """The verifier said of at least one sample what it answers."""

    @property
    def mean(self) -> float:
        """Share of correct samples."""
        return self.correct / self.samples


@dataclass(frozen=True)
class EvaluationMetrics:
    """What is told of a set of prompts."""

    task: str | None
    difficulty: str | None
    prompts: int
    samples: int
    unverified: int
    truncated: int
    tokens_mean: float
    pass_at: Mapping[int, Estimate] = field(default_factory=dict)
    majority_at: Mapping[int, Estimate] = field(default_factory=dict)
    """Empty if no verifier says what a response answers."""

    def record(self) -> dict[str, object]:
        """Return it as JSON."""
        return {
            **{name: value for name, value in vars(self).items() if name not in ("pass_at", "majority_at")},
            **{f"pass@{k}": asdict(found) for k, found in self.pass_at.items()},
            **{f"majority@{k}": asdict(found) for k, found in self.majority_at.items()},
        }


def count_by_prompt(samples: Iterable[EvaluatedSample]) -> list[PromptCounts]:
    """Return the samples counted by prompt, in order."""
    grouped: dict[str, list[EvaluatedSample]] = {}
    for sample in samples:
        grouped.setdefault(sample.prompt_id, []).append(sample)
    return [_tally(group) for group in grouped.values()]


def _tally(samples: Sequence[EvaluatedSample]) -> PromptCounts:
    wrong = Counter(s.read for s in samples if not s.correct and s.read is not None)
    correct = sum(s.correct for s in samples)
    return PromptCounts(
        prompt_id=samples[0].prompt_id,
        task=samples[0].task,
        difficulty=samples[0].difficulty,
        samples=len(samples),
        correct=correct,
        unverified=sum(not s.verified for s in samples),
        truncated=sum(s.truncated for s in samples),
        tokens=sum(s.tokens for s in samples),
        wrong_votes=tuple(sorted(wrong.values())),
        blank=len(samples) - correct - wrong.total(),
        votes_known=any(s.read is not None for s in samples),
    )


def subsets(counted: Sequence[PromptCounts]) -> list[tuple[str | None, str | None, list[PromptCounts]]]:
    """Return all prompts, then those of each task, then those of each difficulty: what there is more than one of."""
    found: list[tuple[str | None, str | None, list[PromptCounts]]] = [(None, None, list(counted))]
    tasks = sorted({tally.task for tally in counted})
    for task in tasks:
        own = [tally for tally in counted if tally.task == task]
        if len(tasks) > 1:
            found.append((task, None, own))
        levels = sorted({tally.difficulty for tally in own}, key=_by_number)
        if len(levels) > 1:
            found += [(task, level, [tally for tally in own if tally.difficulty == level]) for level in levels]
    return found


def _by_number(text: str) -> list[tuple[int, float, str]]:
    """Return a key that puts 9 before 10."""
    parts = re.findall(r"\d+(?:\.\d+)?|[^\d]+", text)
    return [(0, float(part), "") if part[0].isdigit() else (1, 0.0, part) for part in parts]


def sizes(samples: int) -> list[int]:
    """Return the k to tell: 1, 2, 4, ... and the number of samples."""
    return sorted({1 << power for power in range(samples.bit_length())} | {samples})


def compute_metrics(
    counted: Sequence[PromptCounts], task: str | None = None, difficulty: str | None = None
) -> EvaluationMetrics:
    """Return the figures of some prompts, which all have as many samples."""
    n = counted[0].samples
    pass_at = {k: interval([pass_at_k(n, tally.correct, k) for tally in counted]) for k in sizes(n)}
    voted = n > 1 and any(tally.votes_known for tally in counted)
    majority_at = {
        k: interval([majority_at_k(tally.correct, tally.wrong_votes, tally.blank, k) for tally in counted])
        for k in (sizes(n)[1:] if voted else ())
    }
    return EvaluationMetrics(
        task=task,
        difficulty=difficulty,
        prompts=len(counted),
        samples=n * len(counted),
        unverified=sum(tally.unverified for tally in counted),
        truncated=sum(tally.truncated for tally in counted),
        tokens_mean=fmean(tally.tokens / n for tally in counted),
        pass_at=pass_at,
        majority_at=majority_at,
    )


def all_metrics(samples: Iterable[EvaluatedSample]) -> list[EvaluationMetrics]:
    """Return the figures of all prompts, of each task and of each difficulty."""
    return [
        compute_metrics(counted, task, difficulty) for task, difficulty, counted in subsets(count_by_prompt(samples))
    ]
