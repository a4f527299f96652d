"""An event loop in a thread of its own, so that synchronous code can use asynchronous code without being part of it."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for other threads."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether coroutines can be run."""
        return not self._loop.is_closed()

    def call(self, coroutine: Coroutine[object, object, T]) -> T:
        """Run the coroutine there and wait for its result; if the wait is interrupted, it is cancelled."""
        future = self.start(coroutine)
        try:
            return future.result()
        finally:
            future.cancel()

    def start(self, coroutine: Coroutine[object, object, T]) -> "Future[T]":
        """Run the coroutine there; return its future, which cancels it if it is cancelled."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Stop the loop; coroutines that still run are cancelled first."""
        self.call(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
