"""megatron-core without a GPU: the few symbols of torch and megatron-core that must be replaced, and why.

Everything else in the package runs the same code on CPU and CUDA. ``activate`` must be called before a model is
built. Each entry names its target, so that ``missing_targets`` can say what a new megatron-core has moved.
Measured with megatron-core 0.16.1 to 0.19.2 and torch 2.13.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import version

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError

SUPPORTED_MEGATRON_CORE = ("0.16", "0.17", "0.18", "0.19")


@dataclass(frozen=True)
class Replacement:
    """One symbol, written ``module:attribute.path``, with the reason it cannot stay."""

    target: str
    reason: str
    value: object

    def owner(self) -> tuple[object, str]:
        """Return the object that holds the symbol, and the symbol's name in it."""
        module, _, path = self.target.partition(":")
        *parents, name = path.split(".")
        holder: object = importlib.import_module(module)
        for parent in parents:
            holder = getattr(holder, parent)
        return holder, name


def _on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function with ``device="cuda"`` read as cpu and pinned memory ignored.

    megatron-core writes the literal about sixty times (schedules, optimizer, gradient clipping, router statistics).
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
    """Stand in for ``Tensor.type``: without arguments it names the type as megatron-core's assertions expect."""
    named = _type(tensor, *args, **kwargs)
    return named.replace("torch.", "torch.cuda.", 1) if isinstance(named, str) else named


def _stay(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
    return tensor


def _splits_on_host(dispatcher: object, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
    """Stand in for the asynchronous copy of the token counts to the host: they are there already."""
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
    """A stream whose work is done when the call returns."""

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
        Replacement(f"torch:{name}", 'megatron-core makes tensors with device="cuda"', _on_cpu(getattr(torch, name)))
        for name in _FACTORIES
    ),
    Replacement("torch:Tensor.cuda", "there is no other device to move to", _stay),
    Replacement("torch:Tensor.type", "gradient clipping and two optimizers ask for torch.cuda types", _as_on_cuda),
    # Functions of ours, not torch.cpu's: the compiler keeps a table of torch's functions, each only once.
    Replacement("torch.cuda:current_device", "about forty buffers are made on the current device", _current_device),
    Replacement("torch.cuda:current_stream", "gradient reduction (0.18 on) makes streams wait", _current_stream),
    Replacement("torch.cuda:synchronize", "pipeline communication and checkpoints wait for the device", _synchronize),
    Replacement(f"{_DISPATCHER}.cuda_dtoh_stream", "the dispatcher makes a CUDA stream otherwise", _NoStream()),
    Replacement(
        f"{_DISPATCHER}._maybe_dtoh_and_synchronize", "it copies token counts with CUDA streams", _splits_on_host
    ),
    Replacement(f"{_RANDOM}:_get_cuda_rng_state", "recomputation saves the CUDA generator", _get_rng_state),
    Replacement(f"{_RANDOM}:_set_cuda_rng_state", "recomputation restores the CUDA generator", _set_rng_state),
    Replacement("torch.cuda:get_rng_state", "the random tracker reads the CUDA generator", _get_rng_state),
    Replacement(
        "torch._dynamo.config:disable", "megatron-core compiles small functions: seconds each, and a C++ compiler", True
    ),
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
    """Make megatron-core run on CPU in this process; once is enough, again is harmless.

    Raises:
        ConfigError: where CUDA is available, or megatron-core is of a version that was not measured.
    """
    global _is_active
    if _is_active:
        return
    if torch.cuda.is_available():
        raise ConfigError(
            "the CPU stand-ins for CUDA were asked for where CUDA is available; unset MEGATRON_RL_DEVICE or set "
            "CUDA_VISIBLE_DEVICES= to hide the GPUs"
        )
    found = version("megatron-core")
    if not found.startswith(SUPPORTED_MEGATRON_CORE) or (missing := missing_targets()):
        detail = "" if not found.startswith(SUPPORTED_MEGATRON_CORE) else f"; missing: {', '.join(missing)}"
        raise ConfigError(
            f"megatron-core {found} was not measured on CPU{detail}; "
            f"install a version that starts with {' or '.join(SUPPORTED_MEGATRON_CORE)}"
        )
    for replacement in REPLACEMENTS:
        holder, name = replacement.owner()
        setattr(holder, name, replacement.value)
    _is_active = True
