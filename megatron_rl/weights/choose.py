"""The carrier that a run's configuration names."""

from pathlib import Path

from megatron_rl.config.schema import Run
from megatron_rl.weights.disk import DiskCarrier
from megatron_rl.weights.protocol import Carrier
from megatron_rl.weights.tensor import TensorCarrier


def carrier_of(run: Run) -> Carrier:
    """Return the carrier; the disk carrier writes to the run folder."""
    if run.weights.carrier == "disk":
        return DiskCarrier(run.weights.bucket_bytes, Path(run.log.path) / "weights", Path(run.model.path))
    return TensorCarrier(run.weights.bucket_bytes)
