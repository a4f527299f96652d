"""The experts that tokens take, as an engine records them and as a column of a batch has them. No torch here.

Legend: T tokens, A all layers of the model, L layers with experts, K experts per token.
"""

import base64
import binascii
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class RouteShape:
    """What a record of a model's routes looks like.

    Attributes:
        layers: the layers with experts, counted from 0.
        all_layers: layers of the model, those without experts included: engines record them all.
        experts: experts of a layer.
        per_token: experts that a token takes.
    """

    layers: tuple[int, ...]
    all_layers: int
    experts: int
    per_token: int

    @property
    def each(self) -> tuple[int, int]:
        """The trailing dimensions (L, K) of a column of routes."""
        return len(self.layers), self.per_token

    @property
    def dtype(self) -> Literal["uint8", "int16"]:
        """The smallest type that numbers the experts."""
        return "uint8" if self.experts <= 256 else "int16"

    def decode(self, record: str, tokens: int) -> np.ndarray:
        """Return [T, L, K] of a server's record: base64 of little-endian int32 [T, A, K].

        Raises:
            ValueError: it is not that, or a token has an expert twice or one that the model has not.
        """
        try:
            raw = base64.b64decode(record, validate=True)
        except binascii.Error as error:
            raise ValueError(f"it is not base64: {error}") from error
        expected = tokens * self.all_layers * self.per_token
        if len(raw) != 4 * expected:
            product = f"{tokens} tokens * {self.all_layers} layers * {self.per_token} experts"
            raise ValueError(f"it has {len(raw) // 4} numbers, expected {product} = {expected}")
        all_TAK = np.frombuffer(raw, dtype="<i4").reshape(tokens, self.all_layers, self.per_token)
        routes_TLK = all_TAK[:, list(self.layers)]
        if routes_TLK.size and not 0 <= routes_TLK.min() <= routes_TLK.max() < self.experts:
            found = f"{routes_TLK.min()} to {routes_TLK.max()}"
            raise ValueError(f"it has experts {found}, the model's are 0 to {self.experts - 1}")
        ordered_TLK = np.sort(routes_TLK, axis=-1)
        if (ordered_TLK[..., 1:] == ordered_TLK[..., :-1]).any():
            raise ValueError("it sends a token to the same expert twice")
        return routes_TLK.astype(self.dtype)


def encode_routes(routes_TAK: np.ndarray) -> str:
    """Return a server's record: base64 of little-endian int32 [T, A, K]."""
    return base64.b64encode(np.ascontiguousarray(routes_TAK, dtype="<i4").tobytes()).decode("ascii")
