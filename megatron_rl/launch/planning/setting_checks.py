"""Settings that are valid one by one, but with which a run would fail later or learn nothing."""

from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.config.tasks import JsonlTask
from megatron_rl.launch.planning.model_sizes import ModelSizes


def check_settings(loaded: Loaded[Run], sizes: ModelSizes | None) -> Iterator[str]:
    """Yield the problems of a run's settings; ``sizes`` is None if the model cannot be read."""
    run = loaded.run
    task = run.task
    holds_out = not isinstance(task, JsonlTask) or task.heldout_path is not None or task.heldout_fraction > 0
    if run.evaluate.every and not holds_out:
        yield (
            f"{loaded.describe('evaluate.every')}, but no prompt is held out; set task.heldout_path or"
            " task.heldout_fraction, or write evaluate.every = 0"
        )
    vocabulary = sizes.vocabulary if sizes is not None else None
    for token in run.rollout.sampling.stop_token_ids:
        if vocabulary is not None and token >= vocabulary:
            yield (
                f"{loaded.describe('rollout.sampling.stop_token_ids')}: the model has no token {token}; its vocabulary"
                f" has {vocabulary}"
            )
    yield from _url_problems(loaded)


def check_learning(loaded: Loaded[Run]) -> Iterator[str]:
    """Yield the settings with which a run learns nothing."""
    run = loaded.run
    if run.train.group_size == 1:
        yield (
            f"{loaded.describe('train.group_size')}: the baseline of a response is its group, so every advantage would"
            " be 0 and nothing would be learned; write 2 or more"
        )
    if not any(run.reward.weights_in_order):
        yield f"{loaded.describe('reward.weights')}: all rewards have the weight 0, so every reward would be 0"
    if run.rollout.sampling.top_k == 1:
        yield (
            f"{loaded.describe('rollout.sampling.top_k')}: all responses to a prompt would be the same, so every"
            " advantage would be 0; write another number, or -1 for no limit"
        )


def _url_problems(loaded: Loaded[Run]) -> Iterator[str]:
    urls = loaded.run.rollout.urls
    for url in urls:
        if (problem := _url_problem(url)) is not None:
            yield f"rollout.urls ({loaded.origin('rollout.urls')}): {url!r} {problem}; write http://host:port"
    for url, count in Counter(url.rstrip("/") for url in urls).items():
        if count > 1:
            yield f"rollout.urls ({loaded.origin('rollout.urls')}): {url!r} is there {count} times; write it once"


def _url_problem(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"is no address: {error}"
    if parts.scheme not in ("http", "https"):
        return "does not begin with http:// or https://"
    if not parts.hostname or port == 0:
        return "names no host" if not parts.hostname else "has the port 0"
    return "has a query or fragment" if parts.query or parts.fragment else None


def setting_warnings(loaded: Loaded[Run]) -> Iterator[str]:
    """Yield settings that work and are probably mistakes."""
    run = loaded.run
    updates = run.train.steps * run.train.updates_per_step
    if run.optimizer.warmup_steps >= updates:
        yield (
            f"{loaded.describe('optimizer.warmup_steps')}, but the run has {updates} optimizer steps: the learning rate"
            " never reaches optimizer.lr"
        )
    if run.optimizer.schedule != "constant" and run.optimizer.min_lr > run.optimizer.lr:
        yield (
            f"{loaded.describe('optimizer.min_lr')} is above optimizer.lr = {run.optimizer.lr}: the learning rate rises"
        )
