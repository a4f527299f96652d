"""Routes (the experts that process each token) as recorded by a rollout engine and as a batch column, without torch.

Legend: T tokens, A all layers of the model, L layers with experts, K experts per token.
"""

import base64
import binascii
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class RouteShape:
    """Layers and experts of a model, which determine the shape of its routes.

    Attributes:
        layers: indices of the layers with experts, from 0.
        all_layers: number of layers of the model, including layers without experts, which engines record too.
        experts: number of experts per layer.
        per_token: number of experts per token.
    """

    layers: tuple[int, ...]
    all_layers: int
    experts: int
    per_token: int

    @property
    def trailing_shape(self) -> tuple[int, int]:
        """The trailing dimensions (L, K) of a column of routes."""
        return len(self.layers), self.per_token

    @property
    def dtype(self) -> Literal["uint8", "int16"]:
        """The smallest of the two integer types that can represent every expert index."""
        return "uint8" if self.experts <= 256 else "int16"

    def decode(self, record: str, tokens: int) -> np.ndarray:
        """Decode the record of a server, base64 of little-endian int32 [T, A, K].

        Args:
            record: the base64 text.
            tokens: expected number of tokens (T).

        Returns:
            Expert indices, [T, L, K] of type ``dtype``, for the layers with experts.

        Raises:
            ValueError: the record is not base64 or has the wrong size, a token has an expert twice, or an expert index
                is out of range.
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
    """Encode expert indices, [T, A, K], as the record of a server: base64 of little-endian int32."""
    return base64.b64encode(np.ascontiguousarray(routes_TAK, dtype="<i4").tobytes()).decode("ascii")
