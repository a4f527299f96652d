"""The reward of a response: the score of the task's verifier plus the other configured rewards.

A ``RewardFunction`` is built from the configuration alone, without tokenizer and prompt files, so that any process can
have one.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from megatron_rl.algorithms.advantages import overlong_penalty
from megatron_rl.config.tasks import AnyTask, ChainedArithmeticTask, JsonlTask, ReasoningGymTask, Reward
from megatron_rl.data.types import Prompt, Response
from megatron_rl.errors import ConfigError
from megatron_rl.tasks import chained_arithmetic
from megatron_rl.tasks.base import Verdict, unfinished, unverified
from megatron_rl.tasks.code import CodeVerifier, check_sandbox
from megatron_rl.tasks.reasoning_gym import ReasoningGymVerifier
from megatron_rl.tasks.remote import Job, RemoteVerifier
from megatron_rl.tasks.verifiers import ScoreFn, find_score_fn, is_url, read_answer

VerifyFn = Callable[[Prompt, Response], Verdict]

INLINE_VERIFIERS = ("exact", "number")
"""Verifiers that cannot hang, nor raise for answers that were checked, and so need no process of their own."""

SERVER_TIME_SHARE = 0.9
"""Share of ``reward.seconds`` in which servers must answer a batch. The rest is for the other verifiers."""

_OPENED_TAG = re.compile(r"(<\w+>)\s*$")

FORMATS: Mapping[str, str] = {"think": r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"}
"""Named regular expressions for ``reward.format``."""


class RewardFunction:
    """Computes the reward of responses."""

    def __init__(self, task: AnyTask, reward: Reward, max_new_tokens: int) -> None:
        self.reward, self.max_new_tokens = reward, max_new_tokens
        self.task_verifier = _task_verifier(task, reward)
        self.extra_verifiers = {name: find_verifier(verifier, reward) for name, verifier in reward.verifiers.items()}
        verifiers = dict(reward.verifiers) | ({"task": task.verifier} if isinstance(task, JsonlTask) else {})
        urls = {name: url for name, url in verifiers.items() if is_url(url) and reward.http_batch > 1}
        self.batch_servers = {name: RemoteVerifier(url, reward.seconds) for name, url in urls.items()}
        """Servers that score many responses per request, by name of the reward."""
        self.format = re.compile(FORMATS.get(reward.format, reward.format), re.DOTALL)
        self.weights = dict(zip(reward.names, reward.weights_in_order, strict=True))

    def verify_batch(self, jobs: Sequence[Job]) -> list[dict[str, Verdict]]:
        """Return the verdicts of ``batch_servers`` on each response, by name of the reward."""
        verdicts: list[dict[str, Verdict]] = [{} for _ in jobs]
        finished = [index for index, (_, response) in enumerate(jobs) if response.finish_reason == "stop"]
        for name, server in self.batch_servers.items():
            seconds = SERVER_TIME_SHARE * self.reward.seconds / len(self.batch_servers)
            answers = server.verify_batch([jobs[index] for index in finished], seconds)
            for index, verdict in zip(finished, answers, strict=True):
                verdicts[index][name] = verdict
        return verdicts

    def verify(self, prompt: Prompt, response: Response, known: Mapping[str, Verdict] | None = None) -> Verdict:
        """Return the verdict on one response. It is unverified if any of its rewards is.

        Args:
            prompt: the prompt of the response.
            response: needs text, token ids and finish reason only.
            known: the verdicts of ``verify_batch`` on this response.
        """
        known = known or {}
        if response.finish_reason == "failed":
            return unverified("environment", "its environment failed")
        verdict = known.get("task") or self.task_verifier(prompt, response)
        scores = {"task": verdict.score}
        failed = verdict if verdict.score is None else None
        for name, verifier in self.extra_verifiers.items():
            extra = known.get(name) or unfinished(response) or verifier(prompt, response)
            scores[name] = extra.score
            failed = extra if failed is None and extra.score is None else failed
        if failed is not None:
            return Verdict(None, verdict.correct, failed.reason, failed.failure)
        scores |= self._format_and_length(prompt, response)
        if len(scores) == 1 and self.weights["task"] == 1:
            return verdict
        rewards = {name: score for name, score in scores.items() if score is not None}
        score = sum(self.weights[name] * reward for name, reward in rewards.items())
        return replace(verdict, score=score, rewards=rewards)

    def _format_and_length(self, prompt: Prompt, response: Response) -> Mapping[str, float]:
        rewards: dict[str, float] = {}
        if self.reward.format:
            text = opened_tag(prompt.text) + response.sampled_text
            rewards["format"] = float(self.format.fullmatch(text) is not None)
        if self.reward.overlong_tokens:
            length_B = torch.tensor([len(response.output_ids)])
            rewards["overlong"] = float(overlong_penalty(length_B, self.max_new_tokens, self.reward.overlong_tokens))
        return rewards


def runs_inline(task: AnyTask, reward: Reward) -> bool:
    """Return whether no configured verifier can hang or raise, so that none needs a process of its own."""
    checked = isinstance(task, JsonlTask) and task.verifier in INLINE_VERIFIERS
    inline = checked or isinstance(task, ChainedArithmeticTask)
    # Answers are checked for the task's verifier only, so "number" may raise as an extra verifier.
    return inline and not reward.format and all(name == "exact" for name in reward.verifiers.values())


def reads_tags(task: AnyTask, reward: Reward) -> bool:
    """Return whether a reward looks for tags, which are special tokens of some tokenizers."""
    return bool(reward.format) or (isinstance(task, ReasoningGymTask) and task.extract == "tag")


def opened_tag(prompt: str) -> str:
    """Return the tag with which a prompt ends, such as the ``<think>`` of a template, or nothing."""
    tag = _OPENED_TAG.search(prompt)
    return tag[1] if tag else ""


def runs_code(task: AnyTask, reward: Reward) -> bool:
    """Return whether a verifier runs code that the model wrote."""
    names = [task.verifier] if isinstance(task, JsonlTask) else []
    return "code" in (*names, *reward.verifiers.values())


def _task_verifier(task: AnyTask, reward: Reward) -> VerifyFn:
    if isinstance(task, ChainedArithmeticTask):
        return chained_arithmetic.verify
    if isinstance(task, ReasoningGymTask):
        return ReasoningGymVerifier(task).verify
    return require_stop(find_verifier(task.verifier, reward))


def find_verifier(name: str, reward: Reward) -> VerifyFn:
    """Return the verifier with this name, from ``path/to/file.py:function``, or for the server at this URL.

    Raises:
        ConfigError: there is no such verifier, or it cannot be used.
    """
    if is_url(name):
        return RemoteVerifier(name, reward.seconds)
    if name == "code":
        return CodeVerifier(reward)
    return from_score(find_score_fn(name), name)


def check_verifiers(names: Mapping[str, str], reward: Reward) -> Iterator[str]:
    """Yield the problems of verifiers, given as setting -> name."""
    for key, name in names.items():
        try:
            find_verifier(name, reward)
        except ConfigError as error:
            yield str(error).replace("task.verifier", key)
    if "code" in names.values():
        if not reward.allow_code:
            key = next(key for key, name in names.items() if name == "code")
            yield (
                f'{key} = "code" runs the code that the model writes on this machine, in a sandbox; read docs/tasks.md'
                " and set reward.allow_code = true, or choose another verifier"
            )
        else:
            yield from check_sandbox()


def require_stop(verifier: VerifyFn) -> VerifyFn:
    """Return the verifier, except that responses that did not end by themselves are wrong."""

    def verify(prompt: Prompt, response: Response) -> Verdict:
        return unfinished(response) or verifier(prompt, response)

    return verify


def from_score(score_fn: ScoreFn, name: str) -> VerifyFn:
    """Return the verifier that calls a scoring function with prompt text, response text and answer."""

    def verify(prompt: Prompt, response: Response) -> Verdict:
        score = score_fn(prompt.text, response.answer_text, prompt.answer)
        if score is None:
            return unverified("declined", "not verified")
        if not isinstance(score, int | float) or not math.isfinite(score):
            return unverified("invalid", f"{name} (task.verifier) returned {score!r}")
        answer = read_answer(name, response.answer_text)
        return Verdict(float(score), score >= 1.0, answer=answer)

    return verify
