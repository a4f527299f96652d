"""The experts that tokens take, as an engine records them and as a column of a batch has them. No torch here.

Legend: T tokens, A layers of the model, L layers with experts, E experts that a token takes in each.
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
        """(L, E)."""
        return len(self.layers), self.per_token

    @property
    def dtype(self) -> Literal["uint8", "int16"]:
        """The smallest type that numbers the experts."""
        return "uint8" if self.experts <= 256 else "int16"

    def decode(self, record: str, tokens: int) -> np.ndarray:
        """Return [T, L, E] of a server's record: base64 of little-endian int32 [T, A, E].

        Raises:
            ValueError: it is not that, or a token has an expert twice or one that the model has not.
        """
        try:
            raw = base64.b64decode(record, validate=True)
        except binascii.Error as error:
            raise ValueError(f"it is not base64: {error}") from error
        expected = tokens * self.all_layers * self.per_token
        if len(raw) != 4 * expected:
            said = f"{tokens} tokens * {self.all_layers} layers * {self.per_token} experts"
            raise ValueError(f"it has {len(raw) // 4} numbers, expected {said} = {expected}")
        all_TAE = np.frombuffer(raw, dtype="<i4").reshape(tokens, self.all_layers, self.per_token)
        routes_TLE = all_TAE[:, list(self.layers)]
        if routes_TLE.size and not 0 <= routes_TLE.min() <= routes_TLE.max() < self.experts:
            found = f"{routes_TLE.min()} to {routes_TLE.max()}"
            raise ValueError(f"it has experts {found}, the model's are 0 to {self.experts - 1}")
        ordered_TLE = np.sort(routes_TLE, axis=-1)
        if (ordered_TLE[..., 1:] == ordered_TLE[..., :-1]).any():
            raise ValueError("it sends a token to the same expert twice")
        return routes_TLE.astype(self.dtype)


def encode_routes(routes_TAE: np.ndarray) -> str:
    """Return a server's record: base64 of little-endian int32 [T, A, E]."""
    return base64.b64encode(np.ascontiguousarray(routes_TAE, dtype="<i4").tobytes()).decode("ascii")
