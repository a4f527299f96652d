"""Memory shared by processes of one machine. Its handle is plain data that travels over HTTP, without pickle.

On a CPU the memory is an anonymous file (memfd): it has no name in a file system, the other side opens it through
/proc, and it is freed when the last process that holds it has closed it or ended. On a GPU it is device memory with a
CUDA IPC handle. The writer synchronizes before it announces data; readers copy, synchronize, and answer before the
writer writes again.
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
_HEADER_BYTES = 64
"""Bytes before the shared data: the token, padded so that the data begins at a multiple of 64."""


class CannotShare(MegatronRLError):
    """This process cannot open the memory."""


@dataclass(frozen=True)
class MemoryLocation:
    """The properties of a process that decide whether it can share memory with another one."""

    boot_id: str
    """Identifies the machine until it restarts; empty if the kernel is not Linux."""
    pid_namespace: str
    """Each container has its own."""
    user: int
    devices: tuple[str, ...]
    """Unique ids of the GPUs that the process sees."""

    @classmethod
    def current(cls) -> "MemoryLocation":
        """Return the location of this process."""
        boot_id, pid_namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
        is_linux = boot_id.is_file() and hasattr(os, "memfd_create")
        return cls(
            boot_id.read_text().strip() if is_linux else "",
            os.readlink(pid_namespace) if is_linux else "",
            os.getuid(),
            tuple(_device_ids()),
        )

    def obstacle(self, other: "MemoryLocation") -> str | None:
        """Return why processes at the two locations cannot share memory; None if they can."""
        if not (self.boot_id and other.boot_id):
            return "shared memory needs Linux on both sides"
        if self.boot_id != other.boot_id:
            return "it runs on another machine"
        if self.pid_namespace != other.pid_namespace:
            return "it runs in another container, with another namespace of process ids"
        return None if self.user == other.user else f"it runs as another user, {other.user} and not {self.user}"


@dataclass(frozen=True)
class MemoryHandle:
    """Handle of shared CPU memory: file ``fd`` of process ``pid``, which begins with the token."""

    pid: int
    fd: int
    token: str
    num_bytes: int


@dataclass(frozen=True)
class DeviceHandle:
    """Handle of shared GPU memory, valid for one reader: torch's tuple with bytes as hexadecimal digits."""

    pid: int
    device: str
    """The GPU's unique id: its index differs between processes that see different GPUs."""
    memory: str
    num_bytes: int
    offset_bytes: int
    counter: str
    counter_offset: int
    event: str
    event_sync: bool


Handle = MemoryHandle | DeviceHandle


@dataclass(frozen=True)
class TensorSlice:
    """Some bytes of a tensor, in a shared buffer."""

    name: str
    dtype: str
    """Name of the torch type."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """Offset of the slice in the tensor, in bytes; slices of a tensor are sent in order."""
    num_bytes: int
    offset: int
    """Offset of the slice in the buffer, in bytes."""


class SharedBuffer:
    """A buffer of this process that other processes can open."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            return
        self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._close = weakref.finalize(self, os.close, self._fd)
        os.fchmod(self._fd, 0o600)
        os.ftruncate(self._fd, _HEADER_BYTES + num_bytes)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)  # a reader must never find less than it mapped
        mapped = mmap.mmap(self._fd, _HEADER_BYTES + num_bytes)
        token = secrets.token_bytes(32)
        mapped[: len(token)] = token
        self._token = token.hex()
        self.memory = torch.frombuffer(mapped, dtype=torch.uint8, offset=_HEADER_BYTES)
        """The shared data, uint8 [num_bytes]."""

    def handle(self) -> Handle:
        """Return a handle for one reader; each reader needs its own."""
        if self.device.type != "cuda":
            return MemoryHandle(os.getpid(), self._fd, self._token, self.memory.numel())
        _, memory, size, offset, counter, counter_offset, event, sync = self.memory.untyped_storage()._share_cuda_()
        device = _device_id(self.memory.device.index)
        return DeviceHandle(
            os.getpid(), device, memory.hex(), size, offset, counter.hex(), counter_offset, event.hex(), sync
        )

    def synchronize(self) -> None:
        """Wait until other processes can read what was written."""
        synchronize(self.device)

    def close(self) -> None:
        """Release the memory; it is freed when no reader has it open."""
        del self.memory
        if self.device.type != "cuda":
            self._close()


def open_shared(handle: Handle) -> Tensor:
    """Return another process's shared data, uint8 [num_bytes]; it is released with the last view of the tensor.

    Raises:
        CannotShare: the memory does not exist or does not match the handle.
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
        length = _HEADER_BYTES + handle.num_bytes
        if os.fstat(fd).st_size != length or not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise CannotShare(f"the shared memory of process {handle.pid} does not have {handle.num_bytes} bytes")
        mapped = mmap.mmap(fd, length, access=mmap.ACCESS_COPY)  # writes are private to this process
    finally:
        os.close(fd)
    if not secrets.compare_digest(mapped[:32].hex(), handle.token):
        raise CannotShare(f"the shared memory of process {handle.pid} has another token: it is not the sender's")
    return torch.frombuffer(mapped, dtype=torch.uint8, offset=_HEADER_BYTES)


def can_share_memory() -> bool:
    """Return whether processes of this user on this machine can share memory."""
    if not MemoryLocation.current().boot_id:
        return False
    try:
        shared = SharedBuffer(8, torch.device("cpu"))
        open_shared(shared.handle())
    except (CannotShare, OSError):
        return False
    shared.close()
    return True


def common_device(device: torch.device, locations: Sequence[MemoryLocation]) -> torch.device:
    """Return the device if the processes at all locations see it, else the CPU."""
    if device.type == "cuda" and all(_device_id(device.index or 0) in location.devices for location in locations):
        return device
    return torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished the work of this thread's stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _open_device(handle: DeviceHandle) -> Tensor:
    visible = list(_device_ids())
    if handle.device not in visible:
        raise CannotShare(f"this process does not see GPU {handle.device}; it sees {', '.join(visible) or 'none'}")
    index = visible.index(handle.device)
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
    except RuntimeError as error:  # the only type that torch raises for CUDA errors
        raise CannotShare(f"CUDA did not open the memory of process {handle.pid}: {error}") from error
    return torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", index)).set_(storage)


def _device_ids() -> list[str]:
    return [_device_id(index) for index in range(torch.cuda.device_count())]


def _device_id(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
