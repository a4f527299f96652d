"""Decodes weights from an HTTP body: a pickle in which only tensors are allowed."""

import base64
import binascii
import io
import pickle
from collections import OrderedDict

import torch
from torch import Tensor

from megatron_rl.inference_server.requests import BadRequest
from megatron_rl.weights.dtypes import DTYPES


def _load_storage(raw: bytes) -> object:
    """Load a storage; replaces ``torch.storage._load_from_bytes``, which unpickles arbitrary objects."""
    return torch.load(io.BytesIO(raw), weights_only=True)


_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): torch._utils._rebuild_tensor_v3,
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    ("torch.storage", "_load_from_bytes"): _load_storage,
}


_UNPICKLING_ERRORS = (
    *(pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, RuntimeError, AttributeError),
    *(ArithmeticError, MemoryError, ImportError, AssertionError),
)
"""What a malformed pickle raises; a deeply nested one raises RecursionError, a RuntimeError."""


class TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors and refuses every other global."""

    def find_class(self, module_name: str, global_name: str) -> object:
        """Return the allowed function of this name."""
        if (module_name, global_name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not part of a tensor")
        return _ALLOWED[module_name, global_name]


def read_tensors(payload: str) -> list[tuple[str, Tensor]]:
    """Return the named tensors of a base64 pickle of ``[(name, tensor), ...]``.

    Raises:
        BadRequest: the payload is anything else.
    """
    try:
        named = TensorUnpickler(io.BytesIO(base64.b64decode(payload, validate=True))).load()
    except binascii.Error as error:
        raise BadRequest(f"serialized_named_tensors is not base64: {error}") from error
    except _UNPICKLING_ERRORS as error:
        raise BadRequest(f"serialized_named_tensors is not a pickle of [(name, tensor)]: {error}") from error
    if not isinstance(named, list) or not all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)
        for pair in named
    ):
        raise BadRequest("serialized_named_tensors is not a pickle of [(name, tensor)]: it holds something else")
    return named
