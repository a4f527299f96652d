"""Routes (the experts that process each token) as recorded by a rollout engine and as a batch column, without torch.

Legend: T tokens, A all layers of the model, L layers with experts, K experts per token.
"""

import base64
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pybase64

_PART_BYTES = 1 << 21
_MAX_PAIRWISE = 16


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

    def decode(self, record: str | memoryview, tokens: int) -> np.ndarray:
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
        per_token = 4 * self.all_layers * self.per_token
        if len(record) != 4 * -(-tokens * per_token // 3):
            raise self._wrong_size(_base64(record), tokens)
        routes_TLK = np.empty((tokens, *self.trailing_shape), self.dtype)
        # Parts, so that the decoded bytes need little memory; three tokens are a whole number of base64 quadruples.
        step = 3 * max(1, _PART_BYTES // (3 * per_token))
        for start in range(0, tokens, step):
            stop = min(start + step, tokens)
            raw = _base64(record[start * per_token // 3 * 4 : -(-stop * per_token // 3) * 4])
            if len(raw) != (stop - start) * per_token:
                raise ValueError("it is not base64: padding before the end")
            self._store(raw, routes_TLK[start:stop])
        return routes_TLK

    def _store(self, raw: bytes, routes_TLK: np.ndarray) -> None:
        """Validate the experts of some tokens, and store those of the layers with experts."""
        all_TAK = np.frombuffer(raw, dtype="<u4").reshape(-1, self.all_layers, self.per_token)
        first, last = self.layers[0], self.layers[-1] + 1
        is_contiguous = len(self.layers) == last - first
        chosen_TLK = all_TAK[:, first:last] if is_contiguous else all_TAK[:, list(self.layers)]
        if chosen_TLK.max() >= self.experts:
            signed = chosen_TLK.view("<i4")
            raise ValueError(
                f"it has experts {signed.min()} to {signed.max()}, the model's are 0 to {self.experts - 1}"
            )
        routes_TLK[:] = chosen_TLK
        if has_repeats(routes_TLK):
            raise ValueError("it sends a token to the same expert twice")

    def _wrong_size(self, raw: bytes, tokens: int) -> ValueError:
        product = f"{tokens} tokens * {self.all_layers} layers * {self.per_token} experts"
        expected = tokens * self.all_layers * self.per_token
        return ValueError(f"it has {len(raw) // 4} numbers, expected {product} = {expected}")


def has_repeats(routes_TLK: np.ndarray) -> bool:
    """Return whether a token has the same expert twice in a layer."""
    experts = routes_TLK.shape[-1]
    if experts > _MAX_PAIRWISE:
        ordered_TLK = np.sort(routes_TLK, axis=-1)
        return bool((ordered_TLK[..., 1:] == ordered_TLK[..., :-1]).any())
    # Comparing whole columns is many times faster than sorting short rows.
    columns = np.ascontiguousarray(routes_TLK.reshape(-1, experts).T)
    return any((columns[i] == columns[j]).any() for i in range(experts) for j in range(i))


def _base64(text: str | memoryview) -> bytes:
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"it is not base64: {error}") from error


def encode_routes(routes_TAK: np.ndarray) -> str:
    """Encode expert indices, [T, A, K], as the record of a server: base64 of little-endian int32."""
    return base64.b64encode(np.ascontiguousarray(routes_TAK, dtype="<i4").tobytes()).decode("ascii")
