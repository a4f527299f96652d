"""The form of the weights that a run pushes, and whether a server can take them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rl.config.schema import Run
from megatron_rl.errors import DataError
from megatron_rl.models.encodings import QUANTIZATION_CONFIG, format_of


@dataclass(frozen=True)
class ServedWeights:
    """The form in which a run sends its weights to servers.

    Attributes:
        plain_type: name of the type of tensors that are not quantized.
    """

    plain_type: str

    @classmethod
    def of(cls, run: Run) -> "ServedWeights":
        """Return the form of a run's pushes."""
        return cls(run.rollout.dtype or run.model.dtype)

    def problem(self, method: str, settings: Mapping[str, Any] | None) -> str | None:
        """Return why a server cannot take these weights, and what to do; None if it can.

        Args:
            method: name of the quantization that the server has; empty if it has none.
            settings: the ``quantization_config`` of its model; None if it is not known.
        """
        if not method:
            return None
        if settings:
            try:
                quantized = format_of({QUANTIZATION_CONFIG: settings})
            except DataError:
                quantized = None
            method = method if quantized is None else quantized.label
        return (
            f"holds quantized weights ({method}), but the run would push {self.plain_type} tensors without scales: it"
            " would refuse them in the middle of a push, or read them as noise; start it with a checkpoint that is"
            " not quantized (megatron-rl convert hf-to-megatron, then megatron-to-hf, write one)"
        )
