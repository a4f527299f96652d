"""``megatron-rl serve``: runs the embedded server in this process until a signal stops it."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.config.saved_run import is_run
from megatron_rl.errors import MegatronRLError
from megatron_rl.fleet.process import require_model
from megatron_rl.fleet.protocol import API_KEY
from megatron_rl.util.ports import check_port

if TYPE_CHECKING:  # --help does not import torch
    from megatron_rl.inference_server.engine import Engine

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("model", metavar="MODEL_DIR|RUN", help="checkpoint of any format, or run folder")
    parser.add_argument("--step", type=int, metavar="N", help="serve these weights of a run folder, not the newest")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=30000, help="port; 0 chooses a free one (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="type of weights and activations"
    )
    parser.add_argument(
        "--batching",
        choices=("request", "continuous"),
        default="request",
        help="request: one request at a time, repeatable bit for bit; continuous: requests share a batch",
    )
    parser.add_argument("--max-rows", type=int, default=512, help="sequences decoded together (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of requests without a sampling_seed")
    parser.add_argument(
        "--api-key",
        default=os.environ.get(API_KEY, ""),
        help=f"key that clients must send as Authorization: Bearer KEY (default: the variable {API_KEY}, or none)",
    )
    parser.add_argument(
        "--trust-code", action="store_true", help="run Python files of MODEL_DIR that its tokenizer names"
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="hold the weights of a quantized MODEL_DIR without quantization; updates must then not be quantized",
    )
    parser.add_argument("--weight-version", default="default", help="version of the weights in the folder")


def model_folder(model: str, step: int | None) -> str:
    """Return the folder of weights to serve: of a run folder those of a step, by default the newest.

    Raises:
        ConfigError: there is a step, but the folder is not a run folder.
        DataError: the run has no weights, or none of this step.
    """
    if step is None and not is_run(Path(model)):
        return model
    from megatron_rl.models.run_weights import find_weights  # imports torch

    return str(find_weights(Path(model), step).weights)


def serve(args: argparse.Namespace) -> int:
    """Load the model and serve it until SIGTERM or SIGINT; return the exit code."""
    args.model = model_folder(args.model, args.step)
    require_model(args.model)
    if args.port:
        check_port(args.host, args.port)
    # Imported late, after cheap checks: torch takes seconds to import.
    import torch

    from megatron_rl.distributed.mesh import on_cuda
    from megatron_rl.inference_server.engine import Engine
    from megatron_rl.inference_server.model import ServedModel

    torch.set_num_threads(args.threads)
    device = torch.device("cuda", 0) if on_cuda() else torch.device("cpu")
    model = ServedModel(
        args.model,
        args.dtype,
        args.weight_version,
        device,
        trust_code=args.trust_code,
        dequantize=args.dequantize,
    )
    engine = Engine(model, args.batching, args.max_rows, args.seed)
    engine.start()
    try:
        asyncio.run(_serve(engine, args.host, args.port, args.api_key))
        return 0 if engine.is_alive() else 1
    finally:
        engine.close()


async def _serve(engine: "Engine", host: str, port: int, api_key: str) -> None:
    from aiohttp import web

    from megatron_rl.inference_server.access import AccessRules, raise_connection_limit, warn_if_public
    from megatron_rl.inference_server.server import EmbeddedServer

    warn_if_public(host, api_key)
    raise_connection_limit()
    access = AccessRules(api_key, (host,))
    # A handler is cancelled when its client disconnects, so that abandoned sequences are not decoded to their end.
    app = EmbeddedServer(engine, access).application()
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    assert runner.server is not None, "was set up"
    idle = asyncio.create_task(access.close_idle_connections(runner.server))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # If the model thread ends, so does the server: its parent sees that.
    engine.on_end = lambda: _wake(loop, stop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await web.TCPSite(runner, host, port).start()
        url = "http://{}:{}".format(*runner.addresses[0][:2])
        log.info("Serving %s on %s with %s batching", engine.model.path, url, engine.batching)
        await stop.wait()
    finally:
        idle.cancel()
        await runner.cleanup()


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(event.set)


def main() -> int:
    """Run the verb as a program, as the child process of a run."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    parser = argparse.ArgumentParser(prog="megatron-rl serve", description=__doc__)
    add_arguments(parser)
    try:
        return serve(parser.parse_args())
    except MegatronRLError as error:
        log.error("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
