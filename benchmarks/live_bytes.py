"""Counts the memory of live tensors, on any device, independent of the allocator."""

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Tracks the storage of every tensor that an operator returns, until the storage is freed.

    Views of an operator's inputs do not count as new. Memory that a kernel allocates and frees within one call is not
    seen.

    Attributes:
        live: bytes in use now.
        peak: largest value of ``live`` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._tracked: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run an operator and track the tensors that it returns."""
        old = {value.untyped_storage()._cdata for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in old:
                self._track(value.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._tracked:
            return

        def freed(_: object) -> None:
            self.live -= size
            del self._tracked[key]

        self._tracked[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
