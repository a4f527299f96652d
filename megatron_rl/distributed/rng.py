"""Saves and restores this rank's random number generators."""

from collections.abc import Mapping

import torch
from torch import Tensor


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators as uint8 tensors on the CPU: ``cpu``, and ``device`` on a GPU."""
    states = {"cpu": torch.default_generator.get_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_rng_states(device: torch.device, states: Mapping[str, Tensor]) -> None:
    """Restore states that ``rng_states`` returned."""
    torch.default_generator.set_state(states["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"], device)
