"""Messages between two processes over a Unix socket: JSON, and the bytes of columns.

Few bytes travel in the message. Many are written to memory without a name, whose descriptor the message carries: the
other process maps it, nothing is copied, and nothing is left behind however the processes end. If there is no shared
memory left, they travel in the message too, which is slower. There is no pickle.
"""

import asyncio
import logging
import mmap
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic_core import from_json, to_json

log = logging.getLogger(__name__)
Message = Mapping[str, Any]
OnMessage = Callable[[Message, bytearray | mmap.mmap], None]
MAX_INLINE_BYTES = 1 << 16
"""More bytes than this travel in shared memory: a mapping costs more than a copy of so few."""
_HEADER = struct.Struct("<IQ?")
_READ_BYTES = 1 << 18


class Channel:
    """One end of a connection; use it on the event loop that made it.

    Args:
        connection: a connected Unix stream socket; the channel closes it.
        on_message: called with each message and its bytes, which may be written to.
        on_close: called once, when either side has closed the connection.
    """

    def __init__(self, connection: socket.socket, on_message: OnMessage, on_close: Callable[[], None]) -> None:
        self._socket, self._on_message, self._on_close = connection, on_message, on_close
        self._loop = asyncio.get_running_loop()
        self._input = bytearray()
        self._descriptors: deque[int] = deque()
        self._output: deque[tuple[memoryview, int | None]] = deque()
        self.is_open = True
        self._is_memory_full = False
        connection.setblocking(False)
        self._loop.add_reader(connection, self._read)

    def send(self, message: Message, columns: Sequence[memoryview] = ()) -> None:
        """Queue a message with the bytes of these columns, one after the other."""
        text, size = to_json(message), sum(column.nbytes for column in columns)
        descriptor = self._shared(columns, size) if size > MAX_INLINE_BYTES else None
        is_shared = descriptor is not None
        frame = b"".join([_HEADER.pack(len(text), size, is_shared), text, *([] if is_shared else columns)])
        self._output.append((memoryview(frame), descriptor))
        self._write()

    def close(self) -> None:
        """Close the connection; closing again has no effect."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        for descriptor in [*self._descriptors, *(d for _, d in self._output if d is not None)]:
            os.close(descriptor)
        self._on_close()

    def _shared(self, columns: Sequence[memoryview], size: int) -> int | None:
        """Return the descriptor of memory with these columns; None if the kernel gives no more."""
        try:
            return _memory(columns)
        except OSError as error:
            if not self._is_memory_full:
                log.warning(
                    "No shared memory for %.1f MB (%s): columns are sent over a socket instead, which is slower;"
                    " nothing is lost. Give this host, or its container, more memory or open files",
                    size / 1e6,
                    error.strerror,
                )
            self._is_memory_full = True
            return None

    def _write(self) -> None:
        while self.is_open and self._output:
            frame, descriptor = self._output[0]
            try:
                sent = socket.send_fds(self._socket, [frame], [] if descriptor is None else [descriptor])
            except BlockingIOError:
                self._loop.add_writer(self._socket, self._write)
                return
            except OSError:
                self.close()
                return
            if descriptor is not None:
                os.close(descriptor)
            self._output[0] = frame[sent:], None
            if sent == len(frame):
                self._output.popleft()
        if self.is_open:
            self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _READ_BYTES, 4)
            self._descriptors += descriptors
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._input += data
        while self.is_open and self._take():
            pass

    def _take(self) -> bool:
        """Deliver the first message if it is complete; return whether it was."""
        if len(self._input) < _HEADER.size:
            return False
        text_size, size, is_shared = _HEADER.unpack_from(self._input)
        start = _HEADER.size + text_size
        end = start if is_shared else start + size
        if len(self._input) < end:
            return False
        text = bytes(self._input[_HEADER.size : start])
        inline = self._input[start:end]
        del self._input[:end]
        self._on_message(from_json(text), _mapped(self._descriptors.popleft(), size) if is_shared else inline)
        return True


def _memory(columns: Sequence[memoryview]) -> int:
    """Return the descriptor of new memory with these columns."""
    descriptor = os.memfd_create("columns", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            for column in columns:
                file.write(column)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _mapped(descriptor: int, size: int) -> mmap.mmap:
    """Map the memory, privately: writing to it changes this process's copy only. Closes the descriptor."""
    try:
        return mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(descriptor)
