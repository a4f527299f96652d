"""The HTTP handlers of the embedded server, which speaks SGLang's API.

One process has one model and one model thread; handlers only validate requests and pass them on.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import TypeVar, cast, get_args

from aiohttp import web

from megatron_rl.fleet.protocol import Endpoint
from megatron_rl.fleet.weight_stream import results_to_json
from megatron_rl.inference_server.access import AccessRules, Refused, read_body
from megatron_rl.inference_server.engine import Engine, EngineStopped, PauseMode
from megatron_rl.inference_server.requests import ActiveSequence, BadRequest, Request, parse_request, validated
from megatron_rl.inference_server.responses import response_json
from megatron_rl.inference_server.shared_buffers import SharedBufferReader, UpdateFromHandleBody
from megatron_rl.inference_server.tensor_payload import read_tensors
from megatron_rl.inference_server.weight_groups import WeightGroups
from megatron_rl.inference_server.weight_streams import received_bucket
from megatron_rl.weights.checksum import SHA256, SUM64
from megatron_rl.weights.shared_memory import MemoryLocation

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Json = dict[str, object]
log = logging.getLogger(__name__)
STREAM_SECONDS, STREAMS_PER_INTERVAL = 0.02, 8
"""Interval between two events of a stream, with so many streams; with more it grows, so that events cost a small part
of the model thread's time."""


class EmbeddedServer:
    """The handlers, one per path."""

    def __init__(self, engine: Engine, access: AccessRules | None = None) -> None:
        """Create the handlers of an engine; ``access`` decides who may use them, by default every local program."""
        access = access or AccessRules()
        self.engine = engine
        self.model = engine.model
        max_elements = max(tensor.numel() for tensor in self.model.tensors.values())
        self.groups = WeightGroups(max_elements)
        self.shared = SharedBufferReader(self.model.device, max_elements)
        self.access = access
        self._next_version: str | None = None
        self._streams = 0

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(client_max_size=0, middlewares=[_errors, self.access.middleware])
        get, post = app.router.add_get, app.router.add_post
        get(Endpoint.HEALTH, self.health)
        get(Endpoint.HEALTH_GENERATE, self.health_generate)
        get(Endpoint.SERVER_INFO, self.server_info)
        get(Endpoint.MODEL_INFO, self.model_info)
        post(Endpoint.GENERATE, self.generate)
        for path, handler in {
            Endpoint.PAUSE: self.pause,
            Endpoint.CONTINUE: self.resume,
            Endpoint.ABORT: self.abort,
            Endpoint.FLUSH: self.flush,
            Endpoint.BEGIN_UPDATE: self.begin_update,
            Endpoint.UPDATE_FROM_TENSOR: self.update_from_tensor,
            Endpoint.JOIN_GROUP: self.join_group,
            Endpoint.UPDATE_FROM_DISTRIBUTED: self.update_from_distributed,
            Endpoint.LEAVE_GROUP: self.leave_group,
            Endpoint.UPDATE_FROM_HANDLE: self.update_from_handle,
            Endpoint.UPDATE_FROM_STREAM: self.update_from_stream,
            Endpoint.END_UPDATE: self.end_update,
            Endpoint.UPDATE_FROM_DISK: self.update_from_disk,
            Endpoint.UPDATE_VERSION: self.update_version,
            Endpoint.WEIGHTS_CHECKER: self.weights_checker,
        }.items():
            post(path, handler)
        return app

    async def _engine(self, function: Callable[[], T]) -> T:
        """Run a function on the model thread."""
        return await asyncio.wrap_future(self.engine.call(function))

    async def health(self, _request: web.Request) -> web.Response:
        """Answer 200 while the model thread runs."""
        return web.Response(status=200 if self.engine.is_alive() else 503)

    async def health_generate(self, _request: web.Request) -> web.Response:
        """Answer 200 once the model thread has handled a command."""
        await self._engine(lambda: None)
        return web.Response()

    async def server_info(self, _request: web.Request) -> web.Response:
        """Return the server's settings."""
        return web.json_response(
            {
                "model_path": self.model.path,
                "dtype": str(self.model.model.dtype).removeprefix("torch."),
                "quantization_config": self.model.quantized.settings if self.model.quantized else None,
                "context_length": self.model.context_length,
                "max_running_requests": self.engine.max_sequences,
                "batching": self.engine.batching,
                "device": str(self.model.device),
                "weight_version": self.model.version,
                "version": "embedded",
                "memory_location": asdict(MemoryLocation.current()),
                "weight_streams": True,
            }
        )

    async def model_info(self, _request: web.Request) -> web.Response:
        """Return the model and the version of its weights."""
        return web.json_response(
            {
                "model_path": self.model.path,
                "tokenizer_path": self.model.path,
                "is_generation": True,
                "weight_version": self.model.version,
            }
        )

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Sample, or score with ``max_new_tokens = 0`` and ``logprob_start_len = 0``."""
        begin = time.perf_counter()
        parsed = parse_request(await read_body(request))
        for sequence in parsed.sequences:
            self._fit(sequence)
        self.engine.submit(parsed)
        if parsed.stream:
            return await self._stream(request, parsed, begin)
        await _finished(self.engine, parsed)
        answers = [response_json(s, self.model, time.perf_counter() - begin) for s in parsed.sequences]
        return web.json_response(answers[0] if parsed.single else answers)

    def _fit(self, sequence: ActiveSequence) -> None:
        """Limit a sequence to the context, or refuse it."""
        context, vocabulary = self.model.context_length, self.model.model.config.get_text_config().vocab_size
        if len(sequence.prompt) >= context:
            raise BadRequest(
                f"the input ({len(sequence.prompt)} tokens) is longer than the model's context ({context} tokens)"
            )
        if not 0 <= min(sequence.prompt) <= max(sequence.prompt) < vocabulary:
            raise BadRequest(f"input_ids has a token outside [0, {vocabulary}): {max(sequence.prompt, key=abs)}")
        if sequence.params.stop_strings and self.model.tokenizer is None:
            raise BadRequest("stop needs a tokenizer, and the model folder has none; send stop_token_ids")
        sequence.limit = min(sequence.limit, context - len(sequence.prompt))

    async def _stream(self, request: web.Request, parsed: Request, begin: float) -> web.StreamResponse:
        """Send the answer so far whenever it has grown, as server-sent events."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        sequence, sent, finished = parsed.sequences[0], 0, False
        done = asyncio.wrap_future(parsed.done)
        self._streams += 1
        try:
            while not finished:
                await asyncio.wait([done], timeout=STREAM_SECONDS * max(1, self._streams / STREAMS_PER_INTERVAL))
                finished = done.done()
                if not finished:
                    await self._engine(lambda: self.engine.update_output(sequence))
                if finished or len(sequence.output_ids) > sent:
                    sent = len(sequence.output_ids)
                    data = json.dumps(response_json(sequence, self.model, time.perf_counter() - begin))
                    await response.write(f"data: {data}\n\n".encode())
            await response.write(b"data: [DONE]\n\n")
        finally:
            self._streams -= 1
            self.engine.call(lambda: self.engine.abort_sequences(parsed.sequences))
        return response

    async def pause(self, request: web.Request) -> web.Response:
        """Stop decoding."""
        body = await _body(request, {"mode"})
        mode = body.get("mode", "abort")
        if mode not in get_args(PauseMode):
            raise BadRequest(f"mode is {mode!r}; write one of {', '.join(get_args(PauseMode))}")
        await self._engine(lambda: self.engine.pause(cast(PauseMode, mode)))
        return _done(f"paused: {mode}")

    async def resume(self, request: web.Request) -> web.Response:
        """Continue decoding."""
        await _body(request, {"torch_empty_cache"})
        await self._engine(self.engine.resume)
        return _done("continued")

    async def abort(self, request: web.Request) -> web.Response:
        """Abort one sequence, or all."""
        body = await _body(request, {"rid", "abort_all", "abort_message"})
        rid = None if body.get("abort_all") else _text(body, "rid")
        await self._engine(lambda: self.engine.abort(rid, str(body.get("abort_message") or "Aborted")))
        return web.Response()

    async def flush(self, _request: web.Request) -> web.Response:
        """Empty the prefix cache."""
        await self._engine(self.engine.flush)
        return web.Response(text="Cache flushed.\n")

    async def begin_update(self, request: web.Request) -> web.Response:
        """Open a weight update."""
        await _body(request, {"selector"})
        self._next_version = None
        self.shared.close()
        await self._engine(self.model.begin_update)
        return _done("weight update begun")

    async def update_from_tensor(self, request: web.Request) -> web.Response:
        """Stage one bucket of tensors."""
        body = await _body(
            request, {"serialized_named_tensors", "load_format", "flush_cache", "abort_all_requests", "weight_version"}
        )
        payloads = body.get("serialized_named_tensors")
        if not isinstance(payloads, list) or len(payloads) != 1 or not isinstance(payloads[0], str):
            raise BadRequest("serialized_named_tensors must be a list of one string: this server has one rank")
        try:
            tensors = await asyncio.to_thread(read_tensors, payloads[0])
        except BadRequest:
            await self._engine(self.model.drop_update)
            raise
        if body.get("abort_all_requests"):
            await self._engine(lambda: self.engine.abort(None))
        staged = await self._engine(lambda: self.model.stage(tensors))
        self._next_version = _version(body)
        return _done(f"{staged} tensors staged")

    async def join_group(self, request: web.Request) -> web.Response:
        """Join a group with the sender of weights."""
        known = {"master_address", "master_port", "rank_offset", "world_size", "group_name", "backend"}
        await self.groups.join(await _body(request, known))
        return _done("joined")

    async def update_from_distributed(self, request: web.Request) -> web.Response:
        """Stage one bucket of tensors that is broadcast in a group."""
        known = {"names", "dtypes", "shapes", "group_name", "flush_cache", "abort_all_requests", "weight_version"}
        body = await _body(request, known | {"load_format"})
        await self._engine(self.model.require_update)
        tensors = await self.groups.receive(body)
        staged = await self._engine(lambda: self.model.stage(tensors))
        self._next_version = _version(body)
        return _done(f"{staged} tensors staged")

    async def leave_group(self, request: web.Request) -> web.Response:
        """Leave a group."""
        self.groups.leave(_text(await _body(request, {"group_name"}), "group_name"))
        return _done("left")

    async def update_from_handle(self, request: web.Request) -> web.Response:
        """Stage slices of tensors from a buffer that the sender shares."""
        raw = await _body(request, {"handle", "slices", "weight_version"})
        body = validated(UpdateFromHandleBody.model_validate, raw)
        await self._engine(self.model.require_update)
        self.shared.open(body.handle)
        # On the model thread, which alone uses the device.
        staged = await self._engine(lambda: self.model.stage(self.shared.read(body.slices)))
        self._next_version = body.weight_version
        return _done(f"{staged} tensors staged")

    async def update_from_stream(self, request: web.Request) -> web.Response:
        """Stage one bucket of tensors that is streamed, and pass it on."""
        async with received_bucket(request.content) as (bucket, chain):
            error = None
            try:
                await self._engine(lambda: self.model.stage(bucket.tensors()))
            except BadRequest as refusal:
                error = str(refusal)
            return web.json_response({"error": error, "chain": results_to_json(await chain)})

    async def end_update(self, request: web.Request) -> web.Response:
        """Apply the staged tensors."""
        await _body(request, set())
        self.shared.close()
        change, version = self.engine.change_weights, self._next_version
        return _done(await self._engine(lambda: change(self.model.end_update, version)))

    async def update_from_disk(self, request: web.Request) -> web.Response:
        """Load a safetensors file or folder."""
        body = await _body(
            request, {"model_path", "load_format", "flush_cache", "abort_all_requests", "weight_version", "keep_pause"}
        )
        path, version = _text(body, "model_path"), _version(body)
        if body.get("abort_all_requests"):
            await self._engine(lambda: self.engine.abort(None))
        change = self.engine.change_weights
        message = await self._engine(lambda: change(lambda: self.model.load(path), version))
        return _done(message, num_paused_requests=0)

    async def update_version(self, request: web.Request) -> web.Response:
        """Set the version of the weights."""
        body = await _body(request, {"new_version", "abort_all_requests"})
        version = _text(body, "new_version")
        if body.get("abort_all_requests", True):
            await self._engine(lambda: self.engine.abort(None))
        await self._engine(lambda: self.engine.change_weights(lambda: None, version))
        return _done(f"weight version is {version}", new_version=version)

    async def weights_checker(self, request: web.Request) -> web.Response:
        """Return the checksum of every tensor."""
        body = await _body(request, {"action", "algorithm"})
        if body.get("action", "checksum") != "checksum":
            raise BadRequest(f"action is {body['action']!r}; this server knows checksum")
        algorithm = body.get("algorithm", SHA256)
        if algorithm not in (SHA256, SUM64):
            raise BadRequest(f"algorithm is {algorithm!r}; this server knows sha256 and {SUM64}")
        checksums = await self._engine(lambda: self.model.checksums(str(algorithm)))
        return _done(f"{len(checksums)} tensors", ranks=[{"checksums": checksums}], algorithm=algorithm)


async def _finished(engine: Engine, request: Request) -> None:
    """Wait for the request; if the client disconnects first, abort its sequences."""
    try:
        await asyncio.wrap_future(request.done)
    except asyncio.CancelledError:
        engine.call(lambda: engine.abort_sequences(request.sequences))
        raise


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refused as error:
        return web.json_response({"error": {"message": str(error)}}, status=error.status)
    except BadRequest as error:
        body = (
            {"error": {"message": str(error)}}
            if request.path == Endpoint.GENERATE
            else {"success": False, "message": str(error)}
        )
        return web.json_response(body, status=400)
    except EngineStopped as error:
        return web.json_response({"error": {"message": str(error)}}, status=503)


async def _body(request: web.Request, known: set[str]) -> Mapping[str, object]:
    raw = await read_body(request)
    try:
        body = json.loads(raw or b"{}")
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest(f"the body is a {type(body).__name__}; send a JSON object")
    if unknown := body.keys() - known:
        raise BadRequest(f"unknown field {sorted(unknown)[0]!r}; known here: {', '.join(sorted(known)) or 'none'}")
    return body


def _text(body: Mapping[str, object], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise BadRequest(f"{key} is {value!r}; send a string")
    return value


def _version(body: Mapping[str, object]) -> str | None:
    return None if body.get("weight_version") is None else _text(body, "weight_version")


def _done(message: str, **more: object) -> web.Response:
    return web.json_response({"success": True, "message": message, **more})
