"""Reference implementations, in torch, of transformer-engine's kernels on lists of tensors: norm, scale and Adam.

``FUNCTIONS`` lists them under their names in ``transformer_engine_torch``. Fused Adam's Python layer is the real one.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], per_tensor: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Return (the norm of all tensors together, [1], the norm of each if asked for)."""
    norms = torch.stack(
        [tensor.norm(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensor_lists[0]]
    )
    return norms.norm()[None], norms if per_tensor else norms.new_empty(0)


def multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], scale: float
) -> None:
    """Write the tensors of the first list times ``scale`` to those of the second."""
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], scale: Tensor
) -> None:
    """Write the tensors of the first list times ``scale`` to those of the second."""
    multi_tensor_scale(chunk_size, noop_flag, tensor_lists, float(scale))


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Step parameters and moments, with decoupled weight decay (arXiv 1711.05101)."""
    assert mode == 1
    assert bias_correction
    for gradient, parameter, mean, square in zip(*tensor_lists, strict=True):
        assert parameter.dtype == torch.float32
        mean.lerp_(gradient.float(), 1 - beta1)
        square.lerp_(gradient.float().square(), 1 - beta2)
        root = (square / (1 - beta2**step)).sqrt() + epsilon
        parameter.sub_(lr * (mean / (1 - beta1**step) / root + weight_decay * parameter))


FUNCTIONS: Mapping[str, Callable[..., object]] = {
    function.__name__: function
    for function in (multi_tensor_l2norm, multi_tensor_scale, multi_tensor_scale_tensor, multi_tensor_adam)
}
