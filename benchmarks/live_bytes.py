"""Counts the memory that operators make and that is still held, on any device, without asking an allocator."""

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Follows the memory of every tensor that an operator returns, from there until it is let go.

    What came in is not new, whatever view of it comes out; what a kernel takes and gives back within one call is not
    seen.

    Attributes:
        live: bytes that are still held.
        peak: the most there were at any one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._followed: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run an operator and follow what it returns."""
        old = {value.untyped_storage()._cdata for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in old:
                self._follow(value.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._followed:
            return

        def gone(_: object) -> None:
            self.live -= size
            del self._followed[place]

        self._followed[place] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
