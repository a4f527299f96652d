import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from tests.contract.conftest import LONG, Contract


async def during(
    server: Contract, body: Mapping[str, object], action: Callable[[], Awaitable[object]]
) -> dict[str, Any]:
    """Return the answer to a request while something else happens after its start."""
    request = asyncio.ensure_future(server.ask_async("/generate", body))
    await asyncio.sleep(server.head_start_seconds)
    assert not request.done(), "the request was over before anything could happen to it"
    await action()
    status, text = await request
    assert status == 200
    return json.loads(text)


def test_health_and_infos(server: Contract) -> None:
    assert server.ask("/health", method="GET")[0] == 200
    assert server.ask("/health_generate", method="GET")[0] == 200
    assert server.json("/model_info", method="GET")["model_path"] == str(server.model)
    assert isinstance(server.json("/model_info", method="GET")["weight_version"], str)
    assert server.json("/server_info", method="GET")["model_path"] == str(server.model)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_paused_request_goes_on_and_finishes(server: Contract, mode: str) -> None:
    async def pause_for_a_while() -> None:
        assert (await server.ask_async("/pause_generation", {"mode": mode}))[0] == 200
        await asyncio.sleep(0.1)
        assert (await server.ask_async("/continue_generation", {}))[0] == 200

    answer = asyncio.run(during(server, LONG, pause_for_a_while))
    assert len(answer["output_ids"]) == len(answer["meta_info"]["output_token_logprobs"]) == 240


def test_an_aborting_pause_answers_with_what_there_is(server: Contract) -> None:
    answer = asyncio.run(during(server, LONG, lambda: server.ask_async("/pause_generation", {"mode": "abort"})))
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(answer["output_ids"]) < 240
    assert len(answer["meta_info"]["output_token_logprobs"]) == len(answer["output_ids"])


def test_a_request_during_a_pause_waits(server: Contract) -> None:
    async def scenario() -> tuple[int, str]:
        await server.ask_async("/pause_generation", {"mode": "retract"})
        request = asyncio.ensure_future(
            server.ask_async("/generate", {**LONG, "sampling_params": {"max_new_tokens": 3}})
        )
        await asyncio.sleep(0.2)
        assert not request.done()
        await server.ask_async("/continue_generation", {})
        return await request

    assert len(json.loads(asyncio.run(scenario())[1])["output_ids"]) == 3


@pytest.mark.parametrize("body", [{"rid": "long"}, {"abort_all": True}])
def test_an_aborted_request_is_answered_with_what_there_is(server: Contract, body: dict[str, Any]) -> None:
    answer = asyncio.run(during(server, {**LONG, "rid": "long"}, lambda: server.ask_async("/abort_request", body)))
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(answer["output_ids"]) < 240


def test_flush_is_refused_while_rows_are_paused_in_place(server: Contract) -> None:
    assert server.ask("/flush_cache", {})[0] == 200

    async def pause_and_flush() -> None:
        await server.ask_async("/pause_generation", {"mode": "in_place"})
        assert (await server.ask_async("/flush_cache", {}))[0] == 400
        await server.ask_async("/continue_generation", {})

    asyncio.run(during(server, LONG, pause_and_flush))


def test_an_unknown_pause_mode_is_refused(server: Contract) -> None:
    assert server.ask("/pause_generation", {"mode": "lunch"})[0] == 400
