"""Whether running servers can take the weights that a run pushes; asks the servers, and needs none of them."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.config.sources import raise_problems
from megatron_rl.errors import RolloutError
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.protocol import ServerUnreachable
from megatron_rl.fleet.quantization import FormJudge, HeldForm, held_form
from megatron_rl.fleet.registry import Registry
from megatron_rl.fleet.vllm import VllmClient
from megatron_rl.models.served_weights import ServedWeights

ANSWER_SECONDS = 5.0
"""Time limit of a server's answer: ``check`` does not wait for servers that are starting."""


def form_judge(run: Run) -> FormJudge:
    """Return what refuses servers that hold their weights in another form than the run's pushes send."""
    served = ServedWeights.of(run)
    return lambda held: served.problem(held.method, held.settings)


def check_server_forms(loaded: Loaded[Run]) -> Sequence[str]:
    """Return a line for each server of ``rollout.urls`` or of the registry that did not tell how it holds its weights.

    Raises:
        ConfigError: a server holds them in another form than the pushes send.
    """
    run = loaded.run
    key = "rollout.urls" if run.rollout.urls else "rollout.registry"
    urls = run.rollout.urls or (Registry(Path(run.rollout.registry)).urls() if run.rollout.registry else ())
    if not urls:
        return ()
    judge, unknown, problems = form_judge(run), list[str](), list[str]()
    for url, held in zip(urls, asyncio.run(_ask_all(run, urls)), strict=True):
        if isinstance(held, HeldForm):
            if (problem := judge(held)) is not None:
                problems.append(f"{key} ({loaded.origin(key)}): {url} {problem} (its form was found in {held.source})")
        else:
            unknown.append(f"{url} did not tell how it holds its weights{held}; it is asked again at the start")
    raise_problems(problems)
    return unknown


async def _ask_all(run: Run, urls: Sequence[str]) -> list[HeldForm | str]:
    client_class = VllmClient if run.rollout.engine == "vllm" else Client
    return await asyncio.gather(*(_ask(client_class(url, None, ANSWER_SECONDS)) for url in urls))


async def _ask(client: Client) -> HeldForm | str:
    """Return how a server holds its weights, or the reason why that is not known."""
    try:
        return await held_form(client, read_names=False) or ""
    except ServerUnreachable:
        return ": it does not answer"
    except RolloutError as error:
        return f": {error}"
    finally:
        await client.close()
