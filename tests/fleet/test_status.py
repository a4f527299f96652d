"""What the status of an answer means: a server that may answer later, or a request that it refuses."""

import asyncio

import pytest
from aiohttp import web

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.protocol import RequestRefused, ServerUnreachable


async def error_of(status: int) -> type[RolloutError]:
    """Return the error of a client whose server answers with this status."""

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status, text="busy")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    client = Client("http://{}:{}".format(*runner.addresses[0]))
    try:
        await client.version()
    except RolloutError as error:
        return type(error)
    finally:
        await client.close()
        await runner.cleanup()
    raise AssertionError(f"{status} is no error")


@pytest.mark.processes
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_like_one_that_is_down(status):
    assert issubclass(asyncio.run(error_of(status)), ServerUnreachable)


@pytest.mark.processes
@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 415])
def test_a_refused_request_is_not_sent_elsewhere(status):
    assert issubclass(asyncio.run(error_of(status)), RequestRefused)
