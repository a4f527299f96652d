"""Warnings about runs that work and learn nothing: one per cause, with the cause and what to change."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_rl.config.schema import Run

CONSECUTIVE_STEPS = 3
"""A cause is reported when it has held for so many steps in a row."""

MANY_TRUNCATED, MANY_WITHOUT_SIGNAL, MANY_UNVERIFIED = 0.5, 0.8, 0.5
"""Fractions of responses and of groups from which on a step counts."""

ALMOST_NONE, ALMOST_ALL = 0.02, 0.98
"""Rewards at which groups have no signal because prompts are too hard, or too easy."""

Metrics = Mapping[str, float | int | None]


@dataclass(frozen=True)
class Symptom:
    """A cause, when it holds, and the warning.

    Attributes:
        cause: its name in ``warnings.jsonl``.
        holds: whether the metrics of a step show it.
        describe: returns the warning for the metrics of a step.
    """

    cause: str
    holds: Callable[[Metrics], bool]
    describe: Callable[[Metrics], str]


class LearningWatch:
    """Finds causes in the metrics of successive steps. The main rank has one."""

    def __init__(self, run: Run) -> None:
        self._symptoms = tuple(_symptoms(run))
        self._lasted: Counter[str] = Counter()
        self._reported: set[str] = set()

    def warnings(self, metrics: Metrics) -> dict[str, str]:
        """Return the warnings that are due after a step, by cause; each cause once."""
        due = {}
        if "loss" not in metrics:
            return {}
        for symptom in self._symptoms:
            cause = symptom.cause
            self._lasted[cause] = self._lasted[cause] + 1 if symptom.holds(metrics) else 0
            if self._lasted[cause] == CONSECUTIVE_STEPS and cause not in self._reported:
                self._reported.add(cause)
                due[cause] = symptom.describe(metrics)
        return due


def _value(metrics: Metrics, name: str, default: float = 0.0) -> float:
    value = metrics.get(name)
    return default if value is None else float(value)


def _symptoms(run: Run) -> list[Symptom]:
    limit = run.rollout.sampling.max_new_tokens
    symptoms = [
        Symptom(
            "truncated",
            lambda metrics: _value(metrics, "truncated_fraction") >= MANY_TRUNCATED,
            lambda metrics: (
                f"{_value(metrics, 'truncated_fraction'):.0%} of the responses are truncated at"
                f" rollout.sampling.max_new_tokens = {limit}, and truncated answers count as wrong; raise it, or let"
                " responses end earlier: the stop tokens, the chat template and reward.overlong_tokens decide that"
            ),
        ),
        Symptom("no signal", _is_without_signal, lambda metrics: _describe_no_signal(run, metrics)),
        Symptom(
            "unverified",
            lambda metrics: _value(metrics, "unverified_fraction") >= MANY_UNVERIFIED,
            lambda metrics: (
                f"{_value(metrics, 'unverified_fraction'):.0%} of the responses have no reward and are not trained; the"
                " column reason of rollouts.jsonl says why: correct the verifier, or raise reward.seconds"
            ),
        ),
        Symptom(
            "no gradient",
            lambda metrics: metrics.get("grad_norm") == 0 and not _is_without_signal(metrics),
            lambda metrics: (
                "the gradient is 0 although groups have a signal: every token is clipped, masked or weighted with 0;"
                " gradient_fraction, clipped_fraction and gate/NAME in metrics.jsonl say which"
            ),
        ),
    ]
    if run.reward.format:
        symptoms.append(
            Symptom(
                "format",
                lambda metrics: metrics.get("reward/format") == 0,
                lambda metrics: (
                    f"no response matches reward.format = {run.reward.format!r}: compare it with the responses in"
                    " rollouts.jsonl; the whole text must match, and a base model may need an example in its prompt"
                ),
            )
        )
    if run.environment.name:
        symptoms.append(
            Symptom(
                "one turn",
                lambda metrics: metrics.get("turns_max") == 1,
                lambda metrics: (
                    f"no response has a second turn: {run.environment.name} (environment.name) never answered; compare"
                    " the text that it expects with the responses in rollouts.jsonl, and show the tools in the prompt"
                    " (task.system_prompt, task.tools)"
                ),
            )
        )
    return symptoms


def _is_without_signal(metrics: Metrics) -> bool:
    return _value(metrics, "zero_variance_fraction") >= MANY_WITHOUT_SIGNAL


def _describe_no_signal(run: Run, metrics: Metrics) -> str:
    share, reward = _value(metrics, "zero_variance_fraction"), _value(metrics, "reward_mean")
    if _value(metrics, "truncated_fraction") >= MANY_TRUNCATED:
        why = "most responses are truncated; raise rollout.sampling.max_new_tokens"
    elif reward <= ALMOST_NONE:
        why = (
            "almost every response is wrong; use easier prompts or a better model, check the format that the verifier"
            f" expects in rollouts.jsonl, or raise train.group_size = {run.train.group_size}"
        )
    elif reward >= ALMOST_ALL:
        why = "almost every response is right; use harder prompts"
    else:
        why = (
            "the responses to a prompt agree; raise rollout.sampling.temperature or train.group_size, or let"
            " train.max_resample_rounds replace such groups"
        )
    return f"{share:.0%} of the groups have no signal, because all their rewards are equal: {why}"
