"""From a response to its reward: the task's verdict, and the other rewards of the configuration on top.

A judge needs the configuration alone, no tokenizer and no prompt files: it is made wherever responses are verified.
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
from megatron_rl.tasks.base import Verdict
from megatron_rl.tasks.code import CodeVerifier, check_sandbox
from megatron_rl.tasks.reasoning_gym import ReasoningGymVerifier
from megatron_rl.tasks.remote import Job, RemoteVerifier
from megatron_rl.tasks.verifiers import ScoreFn, find_score_fn, is_url, read_answer

VerifyFn = Callable[[Prompt, Response], Verdict]

INLINE_VERIFIERS = ("exact", "number")
"""Verifiers that can neither hang nor, on answers that were checked, raise: they need no process of their own."""

ASKING_SHARE = 0.9
"""Of ``reward.seconds``, in which servers must answer a batch: afterwards there is time left to say which did."""

FORMATS: Mapping[str, str] = {"think": r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"}
"""Names for regular expressions of ``reward.format``."""


class RewardFunction:
    """What a response earns."""

    def __init__(self, task: AnyTask, reward: Reward, max_new_tokens: int) -> None:
        self.reward, self.max_new_tokens = reward, max_new_tokens
        self.task = _task_check(task, reward)
        self.others = {name: find_verifier(verifier, reward) for name, verifier in reward.verifiers.items()}
        named = dict(reward.verifiers) | ({"task": task.verifier} if isinstance(task, JsonlTask) else {})
        urls = {name: url for name, url in named.items() if is_url(url) and reward.http_batch > 1}
        self.servers = {name: RemoteVerifier(url, reward.seconds) for name, url in urls.items()}
        self.format = re.compile(FORMATS.get(reward.format, reward.format), re.DOTALL)
        self.weights = dict(zip(reward.names, reward.weights_in_order, strict=True))

    def ask(self, jobs: Sequence[Job]) -> list[dict[str, Verdict]]:
        """Return what the servers that are asked in batches say of each response, by the name of the reward."""
        known: list[dict[str, Verdict]] = [{} for _ in jobs]
        ended = [place for place, (_, response) in enumerate(jobs) if response.finish_reason == "stop"]
        for name, server in self.servers.items():
            seconds = ASKING_SHARE * self.reward.seconds / len(self.servers)
            for place, verdict in zip(ended, server.ask([jobs[place] for place in ended], seconds), strict=True):
                known[place][name] = verdict
        return known

    def verify(self, prompt: Prompt, response: Response, known: Mapping[str, Verdict] | None = None) -> Verdict:
        """Return the verdict on one response: unverified if any of its rewards is. ``known`` is what ``ask`` said."""
        known = known or {}
        if response.finish_reason == "failed":
            return Verdict(None, False, "its environment failed", "environment")
        verdict = known.get("task") or self.task(prompt, response)
        rewards = {"task": verdict.score}
        failed = verdict if verdict.score is None else None
        for name, check in self.others.items():
            other = known.get(name) or require_stop(check)(prompt, response)
            rewards[name] = other.score
            failed = other if failed is None and other.score is None else failed
        if failed is not None:
            return Verdict(None, verdict.correct, failed.reason, failed.failure)
        rewards |= self._shape(response)
        if len(rewards) == 1 and self.weights["task"] == 1:
            return verdict
        given = {name: reward for name, reward in rewards.items() if reward is not None}
        score = sum(self.weights[name] * reward for name, reward in given.items())
        return replace(verdict, score=score, rewards=given)

    def _shape(self, response: Response) -> Mapping[str, float]:
        shape: dict[str, float] = {}
        if self.reward.format:
            shape["format"] = float(self.format.fullmatch(response.text) is not None)
        if self.reward.overlong_tokens:
            length_B = torch.tensor([len(response.output_ids)])
            shape["overlong"] = float(overlong_penalty(length_B, self.max_new_tokens, self.reward.overlong_tokens))
        return shape


def runs_inline(task: AnyTask, reward: Reward) -> bool:
    """Return whether nothing in a configuration can hang or raise, so that it may be judged where it is needed."""
    own = isinstance(task, ChainedArithmeticTask) or (isinstance(task, JsonlTask) and task.verifier in INLINE_VERIFIERS)
    # The answers are checked for the task's own verifier only: another one's may have no number.
    return own and not reward.format and all(name == "exact" for name in reward.verifiers.values())


def runs_code(task: AnyTask, reward: Reward) -> bool:
    """Return whether a verifier runs what the model wrote."""
    own = [task.verifier] if isinstance(task, JsonlTask) else []
    return "code" in (*own, *reward.verifiers.values())


def _task_check(task: AnyTask, reward: Reward) -> VerifyFn:
    if isinstance(task, ChainedArithmeticTask):
        return chained_arithmetic.verify
    if isinstance(task, ReasoningGymTask):
        return ReasoningGymVerifier(task).verify
    return require_stop(find_verifier(task.verifier, reward))


def find_verifier(name: str, reward: Reward) -> VerifyFn:
    """Return the verifier that a name, a file with a function, or a URL stands for."""
    if is_url(name):
        return RemoteVerifier(name, reward.seconds)
    if name == "code":
        return CodeVerifier(reward)
    return from_score(find_score_fn(name), name)


def check_verifiers(names: Mapping[str, str], reward: Reward) -> Iterator[str]:
    """Yield what is wrong with verifiers, given by the setting that names each."""
    for key, name in names.items():
        try:
            find_verifier(name, reward)
        except ConfigError as error:
            yield str(error).replace("task.verifier", key)
    if "code" in names.values():
        if not reward.allow_code:
            key = next(key for key, name in names.items() if name == "code")
            yield (
                f'{key} = "code" runs what the model writes on this machine, in a sandbox; read docs/tasks.md and set'
                " reward.allow_code = true, or choose another verifier"
            )
        else:
            yield from check_sandbox()


def require_stop(check: VerifyFn) -> VerifyFn:
    """Return the check for responses that ended by themselves; others are wrong."""

    def verify(prompt: Prompt, response: Response) -> Verdict:
        if response.finish_reason != "stop":
            return Verdict(0.0, False, f"did not end: {response.finish_reason}")
        return check(prompt, response)

    return verify


def from_score(verifier: ScoreFn, name: str) -> VerifyFn:
    """Return the check that a function of three texts makes."""

    def verify(prompt: Prompt, response: Response) -> Verdict:
        score = verifier(prompt.text, response.answer_text, prompt.answer)
        if score is None:
            return Verdict(None, False, "not verified", "declined")
        if not isinstance(score, int | float) or not math.isfinite(score):
            return Verdict(None, False, f"{name} (task.verifier) gave {score!r}", "invalid")
        answer = read_answer(name, response.answer_text)
        return Verdict(float(score), score >= 1.0, answer=answer)

    return verify
