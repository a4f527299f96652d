"""Client of one inference server: generation, and control of the server and its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from megatron_rl.fleet.http import HttpClient
from megatron_rl.fleet.protocol import BadAnswer, Endpoint, Json, RequestRefused, ServerUnreachable, parse_json
from megatron_rl.fleet.weight_stream import GrowingBytes, stream_bucket
from megatron_rl.weights.flat_bucket import FlatBucket, TensorHeader
from megatron_rl.weights.shared_memory import Handle, MemoryLocation, TensorSlice
from megatron_rl.weights.transport import StreamResult, WeightReceiver


class Client(HttpClient):
    """Client of one server that speaks SGLang's API; use it from one event loop. It implements ``WeightServer``."""

    async def healthy(self, timeout_seconds: float) -> bool:
        """Return whether the server answers its health check."""
        try:
            await self._request("GET", Endpoint.HEALTH, None, timeout_seconds)
        except (ServerUnreachable, RequestRefused):
            return False
        return True

    async def version(self) -> str:
        """Return the version of the server's weights."""
        info = await self._json("GET", Endpoint.MODEL_INFO)
        if not isinstance(info.get("weight_version"), str):
            raise BadAnswer(f"{self.url}{Endpoint.MODEL_INFO}: weight_version is {info.get('weight_version')!r}")
        return str(info["weight_version"])

    async def server_info(self) -> Json:
        """Return the server's description of itself."""
        return await self._json("GET", Endpoint.SERVER_INFO)

    async def model_options(self) -> Json:
        """Return what the server tells about its model: ``model_path`` and ``quantization``, as far as it does."""
        return await self.server_info()

    async def tensor_names(self) -> Sequence[str]:
        """Return the names of the server's tensors; it computes the checksums of all for this."""
        return list((await self.checksums())[1])

    async def pause(self, mode: Literal["abort", "retract", "in_place"], timeout_seconds: float | None = None) -> None:
        """Stop decoding until ``resume``; the mode says what happens to running requests."""
        timeout = self.control_timeout_seconds if timeout_seconds is None else timeout_seconds
        await self._request("POST", Endpoint.PAUSE, {"mode": mode}, timeout, self.retries)

    async def resume(self) -> None:
        """Continue decoding."""
        await self._control(Endpoint.CONTINUE, {})

    async def flush(self) -> None:
        """Empty the server's prefix cache."""
        await self._control(Endpoint.FLUSH, {})

    async def abort(self, rid: str | None) -> None:
        """Abort one sequence by its id, or all sequences."""
        await self._control(Endpoint.ABORT, {"abort_all": True} if rid is None else {"rid": rid})

    async def begin_update(self) -> None:
        """Open a weight update."""
        await self._control(Endpoint.BEGIN_UPDATE, {})

    async def update_from_tensor(self, payload: str) -> None:
        """Send one bucket of a weight update."""
        await self._control(
            Endpoint.UPDATE_FROM_TENSOR, {"serialized_named_tensors": [payload], "flush_cache": False}, retries=0
        )

    async def tensor_parallel(self) -> int:
        """Return the number of ranks that share the server's model."""
        return int(str((await self.server_info()).get("tp_size") or 1))

    async def receiver(self) -> WeightReceiver:
        """Return how the server receives weights; only the embedded server says that it receives streams."""
        info = await self.server_info()
        return WeightReceiver(self.url, int(str(info.get("tp_size") or 1)), info.get("weight_streams") is True)

    async def update_from_stream(self, bucket: FlatBucket, chain: Sequence[str]) -> Mapping[str, StreamResult]:
        """Stream a bucket to the server, which passes it on to the next server of the chain."""
        data = GrowingBytes.complete(bucket.data.numpy().data)
        return await stream_bucket(self, bucket.headers, data, chain, self.control_timeout_seconds)

    async def join_group(self, host: str, port: int, size: int, name: str, backend: str, rank: int = 1) -> None:
        """Make the server join a group as ranks ``rank`` and up; rank 0 has the store at this address."""
        body = {"master_address": host, "master_port": port, "rank_offset": rank, "world_size": size}
        await self._control(Endpoint.JOIN_GROUP, {**body, "group_name": name, "backend": backend}, retries=0)

    async def update_from_distributed(
        self, tensors: Sequence[TensorHeader], group: str, *, is_flat: bool = False
    ) -> None:
        """Make the server receive one bucket that is broadcast in the group, as one array of bytes if it is flat."""
        body: dict[str, object] = {
            "names": [tensor.name for tensor in tensors],
            "dtypes": [tensor.dtype for tensor in tensors],
            "shapes": [tensor.shape for tensor in tensors],
            "group_name": group,
            "flush_cache": False,
            **({"load_format": "flattened_bucket"} if is_flat else {}),
        }
        await self._control(Endpoint.UPDATE_FROM_DISTRIBUTED, body, retries=0)

    async def leave_group(self, name: str) -> None:
        """Make the server leave a group."""
        await self._control(Endpoint.LEAVE_GROUP, {"group_name": name}, retries=0)

    async def memory_location(self) -> MemoryLocation | None:
        """Return where the server runs; None if it does not receive weights through shared memory."""
        location = (await self.server_info()).get("memory_location")
        if location is None:
            return None
        try:
            return TypeAdapter(MemoryLocation).validate_python(location)
        except ValidationError as error:
            raise BadAnswer(f"{self.url}{Endpoint.SERVER_INFO}: memory_location is {str(location)[:80]}") from error

    async def update_from_handle(self, handle: Handle, slices: Sequence[TensorSlice]) -> None:
        """Make the server copy slices of tensors from a shared buffer."""
        body = {"handle": asdict(handle), "slices": [asdict(entry) for entry in slices]}
        await self._control(Endpoint.UPDATE_FROM_HANDLE, body, retries=0)

    async def end_update(self) -> None:
        """Close a weight update and apply the new weights."""
        await self._control(Endpoint.END_UPDATE, {}, retries=0)

    async def update_from_disk(self, folder: str) -> None:
        """Make the server load its weights from a folder that it can read."""
        await self._control(Endpoint.UPDATE_FROM_DISK, {"model_path": folder})

    async def set_version(self, version: str) -> None:
        """Set the version of the server's weights."""
        await self._control(Endpoint.UPDATE_VERSION, {"new_version": version, "abort_all_requests": False})

    async def checksums(self, algorithm: str = "sha256") -> tuple[str, Mapping[str, str]]:
        """Return the algorithm and the checksum of each tensor by the server's names.

        Only the embedded server computes the requested algorithm. The returned one is empty if it is unknown.
        """
        option = {} if algorithm == "sha256" else {"algorithm": algorithm}  # SGLang does not have this field
        answer = await self._json("POST", Endpoint.WEIGHTS_CHECKER, {"action": "checksum", **option})
        ranks = answer.get("ranks")
        merged: dict[str, str] = {}
        for rank, entry in enumerate(ranks if isinstance(ranks, list) else []):
            sums = entry.get("checksums") if isinstance(entry, dict) else None
            if not isinstance(sums, dict):
                raise BadAnswer(
                    f"{self.url}{Endpoint.WEIGHTS_CHECKER}: rank {rank} has no checksums: {str(entry)[:80]}"
                )
            merged |= {(f"{rank}:{name}" if rank else name): str(value) for name, value in sums.items()}
        if not merged or not isinstance(ranks, list):
            raise BadAnswer(f"{self.url}{Endpoint.WEIGHTS_CHECKER}: no checksums in {str(answer)[:80]}")
        if "algorithm" not in answer and len(ranks) == 1 and (await self.server_info()).get("device") == "cpu":
            # SGLang does not name its algorithm, which differs on GPUs; each of several ranks has a shard.
            return "sha256/8", merged
        return str(answer.get("algorithm", "")), merged

    async def _control(self, path: Endpoint, body: Json, retries: int | None = None) -> None:
        await self._request(
            "POST", path, body, self.control_timeout_seconds, self.retries if retries is None else retries
        )

    async def _json(self, method: str, path: str, body: Json | None = None) -> Json:
        answer = parse_json(
            await self._request(method, path, body, self.control_timeout_seconds, self.retries), self.url
        )
        if not isinstance(answer, dict):
            raise BadAnswer(f"{self.url}{path} answered a {type(answer).__name__}, expected an object")
        return answer
