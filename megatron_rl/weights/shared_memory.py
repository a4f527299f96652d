"""Memory that processes of one machine share. What opens it is plain data, which can go over HTTP: no pickle.

On a CPU the memory is an anonymous file (memfd): it has no name in any file system, the other side opens it through
/proc, and it is gone when the last of both has closed it or has ended, however it ended. On a GPU it is the device's,
and the handle is CUDA's. The writer settles before it says that something is there; readers copy, wait for their
copies, and answer before the writer writes again.
"""

import fcntl
import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.errors import MegatronRLError

_NAME = "megatron-rl-weights"
_HEAD_BYTES = 64
"""In front of the shared bytes: the token, and room so that they begin at a multiple of 64."""


class CannotShare(MegatronRLError):
    """The memory cannot be opened here."""


@dataclass(frozen=True)
class Place:
    """Where a process runs, as far as sharing memory depends on it."""

    boot: str
    """The machine, until it starts again; empty where the kernel is not Linux."""
    process_ids: str
    """The namespace of process ids: containers have their own."""
    user: int
    devices: tuple[str, ...]
    """Unique ids of the GPUs that the process sees."""

    @classmethod
    def here(cls) -> "Place":
        """Return this process's."""
        boot, names = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
        known = boot.is_file() and hasattr(os, "memfd_create")
        return cls(
            boot.read_text().strip() if known else "",
            os.readlink(names) if known else "",
            os.getuid(),
            tuple(_device_ids()),
        )

    def apart(self, other: "Place") -> str | None:
        """Return why processes here and there share no memory; None: they can."""
        if not (self.boot and other.boot):
            return "shared memory needs Linux on both sides"
        if self.boot != other.boot:
            return "it runs on another machine"
        if self.process_ids != other.process_ids:
            return "it runs in another container, which has process ids of its own"
        return None if self.user == other.user else f"it runs as another user, {other.user} and not {self.user}"


@dataclass(frozen=True)
class MemoryHandle:
    """What opens shared memory of the CPU: file ``fd`` of process ``pid``, which begins with the token."""

    pid: int
    fd: int
    token: str
    num_bytes: int


@dataclass(frozen=True)
class DeviceHandle:
    """What opens shared memory of a GPU, once: torch's tuple with bytes as hexadecimal digits."""

    pid: int
    device: str
    """The GPU's unique id: its number differs between processes that see different GPUs."""
    memory: str
    num_bytes: int
    offset_bytes: int
    counter: str
    counter_offset: int
    event: str
    event_sync: bool


Handle = MemoryHandle | DeviceHandle


@dataclass(frozen=True)
class TensorPiece:
    """Which bytes of a tensor lie where in a shared buffer."""

    name: str
    dtype: str
    """As torch names it."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """First byte of the tensor that this piece has; pieces of a tensor come in order."""
    num_bytes: int
    offset: int
    """Where the piece begins in the buffer."""


class Shared:
    """A buffer of this process that others can open."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.memory_N = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            return
        self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._close = weakref.finalize(self, os.close, self._fd)
        os.fchmod(self._fd, 0o600)
        os.ftruncate(self._fd, _HEAD_BYTES + num_bytes)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)  # a reader must never find less than it mapped
        mapped = mmap.mmap(self._fd, _HEAD_BYTES + num_bytes)
        token = secrets.token_bytes(32)
        mapped[: len(token)] = token
        self._token = token.hex()
        self.memory_N = torch.frombuffer(mapped, dtype=torch.uint8, offset=_HEAD_BYTES)
        """The shared bytes, uint8."""

    def handle(self) -> Handle:
        """Return what one reader opens it with; every reader needs its own."""
        if self.device.type != "cuda":
            return MemoryHandle(os.getpid(), self._fd, self._token, self.memory_N.numel())
        _, memory, size, offset, counter, counter_offset, event, sync = self.memory_N.untyped_storage()._share_cuda_()
        device = _device_id(self.memory_N.device.index)
        return DeviceHandle(
            os.getpid(), device, memory.hex(), size, offset, counter.hex(), counter_offset, event.hex(), sync
        )

    def settle(self) -> None:
        """Wait until what was written can be read by others."""
        wait_for(self.device)

    def close(self) -> None:
        """Give the memory back, as far as no reader still has it open."""
        del self.memory_N
        if self.device.type != "cuda":
            self._close()


def open_shared(handle: Handle) -> Tensor:
    """Return another process's shared bytes, uint8; they are let go with the last view of the tensor.

    Raises:
        CannotShare: they are not there, or not what the handle names.
    """
    if isinstance(handle, DeviceHandle):
        return _open_device(handle)
    path = f"/proc/{handle.pid}/fd/{handle.fd}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise CannotShare(f"file {handle.fd} of process {handle.pid} is not shared memory for weights")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CannotShare(
            f"the shared memory of process {handle.pid} cannot be opened ({error.strerror}): sender and server must be"
            " processes of one user on one machine, in one container"
        ) from error
    try:
        length = _HEAD_BYTES + handle.num_bytes
        if os.fstat(fd).st_size != length or not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise CannotShare(f"the shared memory of process {handle.pid} does not have {handle.num_bytes} bytes")
        mapped = mmap.mmap(fd, length, access=mmap.ACCESS_COPY)  # what is written here stays here
    finally:
        os.close(fd)
    if not secrets.compare_digest(mapped[:32].hex(), handle.token):
        raise CannotShare(f"the shared memory of process {handle.pid} has another token: it is not the sender's")
    return torch.frombuffer(mapped, dtype=torch.uint8, offset=_HEAD_BYTES)


def can_share() -> bool:
    """Return whether a process here can open what another one of its user shares."""
    if not Place.here().boot:
        return False
    try:
        shared = Shared(8, torch.device("cpu"))
        open_shared(shared.handle())
    except (CannotShare, OSError):
        return False
    shared.close()
    return True


def common_device(device: torch.device, places: Sequence[Place]) -> torch.device:
    """Return the device if all these processes see it, else the CPU."""
    if device.type == "cuda" and all(_device_id(device.index or 0) in place.devices for place in places):
        return device
    return torch.device("cpu")


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what this thread asked of it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _open_device(handle: DeviceHandle) -> Tensor:
    seen = list(_device_ids())
    if handle.device not in seen:
        raise CannotShare(f"this process does not see GPU {handle.device}; it sees {', '.join(seen) or 'none'}")
    index = seen.index(handle.device)
    try:
        storage = torch.UntypedStorage._new_shared_cuda(
            index,
            bytes.fromhex(handle.memory),
            handle.num_bytes,
            handle.offset_bytes,
            bytes.fromhex(handle.counter),
            handle.counter_offset,
            bytes.fromhex(handle.event),
            handle.event_sync,
        )
    except RuntimeError as error:  # all that torch says of CUDA
        raise CannotShare(f"CUDA did not open the memory of process {handle.pid}: {error}") from error
    return torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", index)).set_(storage)


def _device_ids() -> list[str]:
    return [_device_id(index) for index in range(torch.cuda.device_count())]


def _device_id(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
