"""Runs megatron-core without a GPU by replacing a few symbols of torch and megatron-core, each with its reason.

All other code of the package is the same on CPU and CUDA. ``activate`` must be called before a model is built. Each
replacement names its target, so that ``missing_targets`` can list the symbols that a new megatron-core has moved.
Repairs of megatron-core that are not specific to CPUs are in ``policy.upstream``.
Tested with megatron-core 0.16.1 to 0.19.2 and torch 2.13.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import version

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError
from megatron_rl.util.megatron_version import TESTED


@dataclass(frozen=True)
class Replacement:
    """The replacement of one symbol.

    Attributes:
        target: the symbol, as ``module:attribute.path``.
        reason: why it must be replaced.
        value: the new value.
    """

    target: str
    reason: str
    value: object

    def owner(self) -> tuple[object, str]:
        """Return the object that has the attribute, and the attribute's name."""
        module, _, path = self.target.partition(":")
        *parents, name = path.split(".")
        holder: object = importlib.import_module(module)
        for parent in parents:
            holder = getattr(holder, parent)
        return holder, name


def _on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the factory function with ``device="cuda"`` mapped to the CPU and ``pin_memory`` ignored.

    megatron-core has the literal "cuda" about sixty times (schedules, optimizer, gradient clipping, router statistics).
    """

    @wraps(make)
    def on_cpu(*args: object, **kwargs: object) -> Tensor:
        if kwargs:
            kwargs.pop("pin_memory", None)
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return on_cpu


def _as_on_cuda(tensor: Tensor, *args: object, _type: Callable[..., object] = Tensor.type, **kwargs: object) -> object:
    """Replace ``Tensor.type``: type names contain torch.cuda, as megatron-core's assertions expect."""
    named = _type(tensor, *args, **kwargs)
    return named.replace("torch.", "torch.cuda.", 1) if isinstance(named, str) else named


def _return_self(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
    return tensor


def _splits_on_host(dispatcher: object, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
    """Replace the asynchronous copy of token counts to the host, where they already are."""
    if point == getattr(dispatcher, "cuda_dtoh_point"):  # noqa: B009 (megatron-core's class, unknown here)
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            splits = getattr(dispatcher, name, None)
            if isinstance(splits, Tensor):
                setattr(dispatcher, name, splits.numpy())
    return tokens_per_expert


def _current_device() -> str:
    return torch.cpu.current_device()


def _synchronize(device: object = None) -> None:
    pass


def _current_stream(device: object = None) -> "_NoStream":
    return _NoStream()


def _manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


class _NoStream(torch.cpu.Stream):
    """A stream on which all work is synchronous."""

    def wait_stream(self, stream: object) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""


def _get_rng_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: Tensor, device: object = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher"
_RANDOM = "megatron.core.tensor_parallel.random"

_FACTORIES = ("tensor", "zeros", "ones", "full", "empty", "arange", "zeros_like", "ones_like", "empty_like")

REPLACEMENTS = (
    *(
        Replacement(f"torch:{name}", 'megatron-core creates tensors with device="cuda"', _on_cpu(getattr(torch, name)))
        for name in _FACTORIES
    ),
    Replacement("torch:Tensor.cuda", "the CPU is the only device", _return_self),
    Replacement("torch:Tensor.type", "gradient clipping and two optimizers ask for torch.cuda types", _as_on_cuda),
    # Not torch.cpu's functions themselves: torch.compile keeps a table in which each torch function occurs once.
    Replacement("torch.cuda:current_device", "about forty buffers are made on the current device", _current_device),
    Replacement("torch.cuda:current_stream", "gradient reduction (0.18 on) makes streams wait", _current_stream),
    Replacement("torch.cuda:synchronize", "pipeline communication and checkpoints wait for the device", _synchronize),
    Replacement(f"{_DISPATCHER}.cuda_dtoh_stream", "the dispatcher would create a CUDA stream", _NoStream()),
    Replacement(
        f"{_DISPATCHER}._maybe_dtoh_and_synchronize", "it copies token counts with CUDA streams", _splits_on_host
    ),
    Replacement(f"{_RANDOM}:_get_cuda_rng_state", "recomputation saves the CUDA generator", _get_rng_state),
    Replacement(f"{_RANDOM}:_set_cuda_rng_state", "recomputation restores the CUDA generator", _set_rng_state),
    Replacement("torch.cuda:get_rng_state", "the random tracker reads the CUDA generator", _get_rng_state),
    Replacement("torch._dynamo.config:disable", "compiling megatron-core's small functions takes seconds each", True),
    Replacement("torch.cuda:manual_seed", "the random tracker seeds the CUDA generator", _manual_seed),
)


def missing_targets() -> list[str]:
    """Return the replaced symbols that no longer exist in the installed torch and megatron-core."""
    missing = []
    for replacement in REPLACEMENTS:
        holder, name = replacement.owner()
        if not hasattr(holder, name):
            missing.append(replacement.target)
    return missing


_is_active = False


def activate() -> None:
    """Apply all replacements in this process. Later calls do nothing.

    Raises:
        ConfigError: CUDA is available, or megatron-core lacks a symbol that must be replaced.
    """
    global _is_active
    if _is_active:
        return
    if torch.cuda.is_available():
        raise ConfigError(
            "CUDA is available, but the CPU replacements were requested; unset MEGATRON_RL_DEVICE, or set "
            "CUDA_VISIBLE_DEVICES= to hide the GPUs"
        )
    if missing := missing_targets():
        raise ConfigError(
            f"megatron-core {version('megatron-core')} cannot run on a CPU here: it lacks {', '.join(missing)}, which"
            f" must be replaced; install a release of {', '.join(TESTED)}"
        )
    for replacement in REPLACEMENTS:
        holder, name = replacement.owner()
        setattr(holder, name, replacement.value)
    _is_active = True
