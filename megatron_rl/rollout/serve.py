"""``megatron-rl serve``: runs the embedded server in this process until it is told to stop."""

import argparse
import asyncio
import errno
import logging
import signal
import sys

from megatron_rl.errors import MegatronRLError, RolloutError

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("model", help="folder of a Hugging Face checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument(
        "--batching",
        choices=("request", "continuous"),
        default="request",
        help="request: one request at a time, repeatable bit for bit; continuous: requests share a batch",
    )
    parser.add_argument("--max-rows", type=int, default=512, help="sequences decoded together")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the model")
    parser.add_argument("--seed", type=int, default=0, help="for requests that bring no sampling_seed")
    parser.add_argument("--weight-version", default="default", help="version of the weights in the folder")


def serve(args: argparse.Namespace) -> None:
    """Load the model, then answer until SIGTERM or SIGINT."""
    import torch

    from megatron_rl.rollout.engine import Engine
    from megatron_rl.rollout.model import ServedModel

    torch.set_num_threads(args.threads)
    engine = Engine(ServedModel(args.model, args.dtype, args.weight_version), args.batching, args.max_rows, args.seed)
    engine.start()
    try:
        asyncio.run(_serve(engine, args.host, args.port))
    finally:
        engine.close()


async def _serve(engine: "Engine", host: str, port: int) -> None:  # noqa: F821
    from aiohttp import web

    from megatron_rl.rollout.server import EmbeddedServer

    runner = web.AppRunner(EmbeddedServer(engine).application(), handler_cancellation=True, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
            raise
        raise RolloutError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port") from error
    log.info("serving %s on http://%s:%d, batching by %s", engine.model.path, host, port, engine.batching)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await runner.cleanup()


def main() -> int:
    """Run the verb on its own, as a child process of a run."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    parser = argparse.ArgumentParser(prog="megatron-rl serve", description=__doc__)
    add_arguments(parser)
    try:
        serve(parser.parse_args())
    except MegatronRLError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
