"""The states of this rank's random generators."""

from collections.abc import Mapping

import torch
from torch import Tensor


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """Return torch's generators by name: the one of the CPU, and the device's if it is another. Bytes, on the CPU."""
    states = {"cpu": torch.default_generator.get_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_rng_states(device: torch.device, states: Mapping[str, Tensor]) -> None:
    """Put back what ``rng_states`` gave."""
    torch.default_generator.set_state(states["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"], device)
