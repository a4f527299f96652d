"""Weights in the body of HTTP requests: works between any two machines, with no shared memory and no shared disk."""

import asyncio
import base64
import pickle
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.weights.protocol import Carrier, NamedTensors, Push, Server


@dataclass
class TensorCarrier(Carrier):
    """Sends base64 pickles of ``[(name, tensor)]``.

    A plain pickle on purpose: torch's ForkingPickler with shared file descriptors crashes an SGLang server.
    """

    bucket_bytes: int

    async def begin(self, servers: Sequence[Server], version: int) -> Push:
        """Open a push; SGLang refuses tensors that come before."""
        push = _TensorPush(list(servers), version)
        await push.each(lambda server: server.begin_update())
        return push


class _TensorPush(Push):
    async def _carry(self, bucket: NamedTensors) -> None:
        payload = await asyncio.to_thread(encode, bucket)
        await self.each(lambda server: server.update_from_tensor(payload))

    async def _end(self) -> None:
        await self.each(lambda server: server.end_update())


def encode(bucket: NamedTensors) -> str:
    """Return the tensors as SGLang's ``update_weights_from_tensor`` takes them."""
    # A view is pickled with its whole storage: clone what does not own all of its own.
    own = [(name, t if t.untyped_storage().nbytes() == t.nbytes else t.clone()) for name, t in bucket]
    return base64.b64encode(pickle.dumps(own, protocol=5)).decode("ascii")
