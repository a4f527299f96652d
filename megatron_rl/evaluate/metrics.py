"""Metrics of an evaluation: for all prompts, per task, and per task and difficulty."""

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
    """Counts of the samples of one prompt."""

    prompt_id: str
    task: str
    difficulty: str
    samples: int
    correct: int
    unverified: int
    truncated: int
    tokens: int
    wrong_votes: tuple[int, ...]
    """Number of samples with each wrong answer, sorted."""
    blank: int
    """Number of samples without an answer."""
    votes_known: bool
    """Whether the verifier extracted an answer from at least one sample."""

    @property
    def mean(self) -> float:
        """Share of correct samples."""
        return self.correct / self.samples


@dataclass(frozen=True)
class EvaluationMetrics:
    """Metrics of a set of prompts; ``task`` and ``difficulty`` are None if they cover all."""

    task: str | None
    difficulty: str | None
    prompts: int
    samples: int
    unverified: int
    truncated: int
    tokens_mean: float
    pass_at: Mapping[int, Estimate] = field(default_factory=dict)
    majority_at: Mapping[int, Estimate] = field(default_factory=dict)
    """Empty if the verifier does not extract answers."""

    def record(self) -> dict[str, object]:
        """Return the metrics as JSON."""
        return {
            **{name: value for name, value in vars(self).items() if name not in ("pass_at", "majority_at")},
            **{f"pass@{k}": asdict(estimate) for k, estimate in self.pass_at.items()},
            **{f"majority@{k}": asdict(estimate) for k, estimate in self.majority_at.items()},
        }


def count_by_prompt(samples: Iterable[EvaluatedSample]) -> list[PromptCounts]:
    """Return the counts of each prompt, in the order of first samples."""
    grouped: dict[str, list[EvaluatedSample]] = {}
    for sample in samples:
        grouped.setdefault(sample.prompt_id, []).append(sample)
    return [_count(group) for group in grouped.values()]


def _count(samples: Sequence[EvaluatedSample]) -> PromptCounts:
    wrong = Counter(s.answer_read for s in samples if not s.correct and s.answer_read is not None)
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
        votes_known=any(s.answer_read is not None for s in samples),
    )


def subsets(prompts: Sequence[PromptCounts]) -> list[tuple[str | None, str | None, list[PromptCounts]]]:
    """Return (task, difficulty, prompts) for all prompts, each task and each difficulty, where there are several."""
    found: list[tuple[str | None, str | None, list[PromptCounts]]] = [(None, None, list(prompts))]
    tasks = sorted({prompt.task for prompt in prompts})
    for task in tasks:
        of_task = [prompt for prompt in prompts if prompt.task == task]
        if len(tasks) > 1:
            found.append((task, None, of_task))
        levels = sorted({prompt.difficulty for prompt in of_task}, key=_numeric_key)
        if len(levels) > 1:
            found += [(task, level, [prompt for prompt in of_task if prompt.difficulty == level]) for level in levels]
    return found


def _numeric_key(text: str) -> list[tuple[int, float, str]]:
    """Return a sort key by which 9 comes before 10."""
    parts = re.findall(r"\d+(?:\.\d+)?|[^\d]+", text)
    return [(0, float(part), "") if part[0].isdigit() else (1, 0.0, part) for part in parts]


def reported_k(samples: int) -> list[int]:
    """Return the values of k to report: 1, 2, 4, ... and the number of samples."""
    return sorted({1 << power for power in range(samples.bit_length())} | {samples})


def compute_metrics(
    prompts: Sequence[PromptCounts], task: str | None = None, difficulty: str | None = None
) -> EvaluationMetrics:
    """Return the metrics of prompts with equal numbers of samples."""
    n = prompts[0].samples
    pass_at = {k: interval([pass_at_k(n, prompt.correct, k) for prompt in prompts]) for k in reported_k(n)}
    voted = n > 1 and any(prompt.votes_known for prompt in prompts)
    majority_at = {
        k: interval([majority_at_k(prompt.correct, prompt.wrong_votes, prompt.blank, k) for prompt in prompts])
        for k in (reported_k(n)[1:] if voted else ())
    }
    return EvaluationMetrics(
        task=task,
        difficulty=difficulty,
        prompts=len(prompts),
        samples=n * len(prompts),
        unverified=sum(prompt.unverified for prompt in prompts),
        truncated=sum(prompt.truncated for prompt in prompts),
        tokens_mean=fmean(prompt.tokens / n for prompt in prompts),
        pass_at=pass_at,
        majority_at=majority_at,
    )


def all_metrics(samples: Iterable[EvaluatedSample]) -> list[EvaluationMetrics]:
    """Return the metrics of all prompts, of each task and of each difficulty."""
    return [
        compute_metrics(prompts, task, difficulty) for task, difficulty, prompts in subsets(count_by_prompt(samples))
    ]
