"""A key-value cache whose sequences can be added and removed: right-aligned, in buffers that grow.

Legend: B sequences, D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_MIN_SPARE_POSITIONS = 64


class DecodeCacheLayer(DynamicLayer):
    """One layer's keys and values; appending a token writes in place instead of copying the whole layer."""

    def __init__(self) -> None:
        super().__init__()
        self._key_buffer: Tensor | None = None
        self._value_buffer: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append states [B, heads, positions, D]; return all of them."""
        used = self.get_seq_length()
        self.keys, self._key_buffer = _append(self.keys, self._key_buffer, key_states, used)
        self.values, self._value_buffer = _append(self.values, self._value_buffer, value_states, used)
        self.is_initialized = True
        return self.keys, self.values

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Replace all states; the next token copies them to a larger buffer."""
        self.keys, self.values, self.is_initialized = keys, values, True
        self._key_buffer = self._value_buffer = None


def _append(states: Tensor | None, buffer: Tensor | None, new: Tensor, used: int) -> tuple[Tensor, Tensor]:
    stop = used + new.shape[2]
    if buffer is None or buffer.shape[2] < stop:
        grown = new.new_empty(*new.shape[:2], stop + max(_MIN_SPARE_POSITIONS, stop // 2), new.shape[3])
        if states is not None and used:
            grown[:, :, :used] = states
        buffer = grown
    buffer[:, :, used:stop] = new
    return buffer[:, :, :stop], buffer


class DecodeCache(Cache):
    """The cache of a batch. Every sequence ends at the last position; shorter ones have unused positions in front."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[DecodeCacheLayer() for _ in range(num_layers)])

    @property
    def width(self) -> int:
        """Number of positions, unused ones included."""
        return self.layers[0].get_seq_length()

    def select(self, indices_B: Tensor, start: int) -> None:
        """Keep the sequences at these indices, which may repeat, from position ``start`` on."""
        for layer in self.layers:
            layer.replace(layer.keys[indices_B, :, start:], layer.values[indices_B, :, start:])

    @staticmethod
    def stack(caches: "Sequence[DecodeCache]") -> "DecodeCache":
        """Return one cache with the sequences of all, aligned at their ends."""
        width = max(cache.width for cache in caches)
        stacked = DecodeCache(len(caches[0].layers))
        for index, layer in enumerate(stacked.layers):
            layers = [cache.layers[index] for cache in caches]
            layer.replace(
                torch.cat([_pad_front(old.keys, width) for old in layers]),
                torch.cat([_pad_front(old.values, width) for old in layers]),
            )
        return stacked


def _pad_front(states: Tensor, width: int) -> Tensor:
    missing = width - states.shape[2]
    # Unused positions must be finite: their attention weight is 0, and 0 * nan is nan.
    return torch.nn.functional.pad(states, (0, 0, missing, 0)) if missing else states
