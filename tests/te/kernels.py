"""Reference implementations, in torch, of the C++ kernels that transformer-engine's layers call.

``FUNCTIONS`` lists them under their names in ``transformer_engine_torch``; each has the parameters of the original in
the same order, with defaults where it has some. Products and norms compute in float32 (float64 for float64) and round
once, as the kernels do. FP8, fused GELU and overlapped communication are refused by assertions.

Legend: T tokens, N heads, D head size, G key heads; I, O input and output features.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import transformer_engine_torch as tex
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType

from megatron_rl.policy.rows import zigzag

TORCH_DTYPES: Mapping[object, torch.dtype] = {number: dtype for dtype, number in TE_DType.items()}


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in the dtype in which kernels accumulate."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def product(A: Tensor, transA: bool, B: Tensor, transB: bool) -> Tensor:
    """Return op(B) op(A): what BLAS computes for row-major A and B that it takes for column-major ones."""
    first = wide(B).flatten(0, -2)
    second = wide(A).flatten(0, -2)
    return (first.T if transB else first) @ (second.T if transA else second)


def generic_gemm(
    A: Tensor,
    transA: bool,
    B: Tensor,
    transB: bool,
    D: Tensor | None,
    quantizer: object,
    output_dtype: object,
    bias: Tensor | None,
    bias_type: object,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: object = None,
    comm_type: object = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Tensor | None]:
    """Return [product, gradient of the bias, None, None]; with ``D``, the product is written or added to it."""
    assert quantizer is None
    assert not gelu
    assert comm_overlap is None
    assert extra_output is None
    assert alpha == 1.0
    assert beta == 1.0 if accumulate else beta in (None, 0.0), beta
    assert A.dtype == B.dtype, (A.dtype, B.dtype)
    result = product(A, transA, B, transB)
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = wide(B).flatten(0, -2).sum(0).to(bias.dtype)
    elif bias is not None:
        result = result + bias
    if not transB:
        result = result.unflatten(0, B.shape[:-1])
    if D is None:
        assert not accumulate
        return [
            result.to(A.dtype if output_dtype is None else TORCH_DTYPES[output_dtype]),
            bias_gradient,
            None,
            None,
        ]
    store(D, result.view(D.shape), accumulate)
    return [D, bias_gradient, None, None]


def store(output: Tensor, value: Tensor, accumulate: bool) -> None:
    """Write the value to the output, or add it."""
    output.copy_(wide(output) + value if accumulate else value)


def te_general_grouped_gemm(
    A: Sequence[Tensor],
    transA: bool,
    B: Sequence[Tensor],
    transB: bool,
    D: Sequence[Tensor],
    D_type: object,
    m_splits: Sequence[int],
    bias: Sequence[Tensor],
    bias_type: object,
    single_output: bool,
    pre_gelu_out: Sequence[Tensor],
    grad: bool,
    workspace: Sequence[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> list[Tensor]:
    """Write each group's product to its output (with ``single_output`` to its rows of one) and return the biases."""
    assert all(not tensor.numel() for tensor in pre_gelu_out)
    outputs = D[0].split(list(m_splits)) if single_output else D
    for a, b, output, vector in zip(A, B, outputs, bias, strict=True):
        assert a.dtype == b.dtype, (a.dtype, b.dtype)
        if vector.numel() and grad:
            vector.copy_(wide(b).sum(0))
        result = product(a, transA, b, transB)
        if vector.numel() and not grad:
            result = result + vector
        store(output, result, accumulate)
    return list(bias)


def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Tensor | None,
    quantizer: object,
    otype: object,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Tensor | None]:
    """Return [normalized input, None, reciprocal of each row's root mean square]."""
    assert quantizer is None
    assert not zero_centered_gamma
    values = wide(input)
    scale = torch.rsqrt(values.square().mean(-1) + eps)
    output = (values * scale[..., None] * wide(weight)).to(TORCH_DTYPES[otype])
    return [output if ln_out is None else ln_out.copy_(output), None, scale]


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """Return [gradient of the input, gradient of the weight]."""
    assert not zero_centered_gamma
    assert dz.shape == x.shape, (dz.shape, x.shape)
    unit = wide(x) * rsigma[..., None]
    scaled = wide(dz) * wide(gamma)
    gradient = rsigma[..., None] * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    return [gradient.to(x.dtype), (wide(dz) * unit).flatten(0, -2).sum(0).to(gamma.dtype)]


def rotated(
    t: Tensor,
    freqs: Tensor,
    qkv_format: object,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
    sign: int,
) -> Tensor:
    """Return the heads [T, N, D], their first dimensions rotated by ``sign`` times the angle of their position."""
    assert qkv_format == tex.NVTE_QKV_Format.NVTE_THD, qkv_format
    assert cu_seqlens is not None
    assert cu_seqlens.dtype == torch.int32
    assert freqs.dtype == torch.float32
    lengths = cu_seqlens.diff().long()
    positions_T = zigzag(lengths, cp_rank, cp_size)
    positions_T = positions_T - cu_seqlens[:-1].long().repeat_interleave(lengths // cp_size)
    assert len(t) == len(positions_T), (t.shape, cu_seqlens)
    angles_T1D = freqs[positions_T].flatten(1)[:, None]
    width = angles_T1D.shape[-1]
    head, rest = wide(t)[..., :width], t[..., width:]
    if interleaved:
        turned = torch.stack([-head[..., 1::2], head[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = head.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    return torch.cat([(head * angles_T1D.cos() + sign * turned * angles_T1D.sin()).to(t.dtype), rest], dim=-1)


def fused_rope_forward(
    input: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: object,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Return the rotated heads."""
    assert start_positions is None
    return rotated(input, freqs, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, 1)


def fused_rope_backward(
    output_grads: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: object,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Return the gradient rotated back."""
    assert start_positions is None
    return rotated(output_grads, freqs, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, -1)


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, b: int, max_seq_len: int) -> Tensor:
    """Return [b, max_seq_len, N, D] with each sequence at the start of its row, zeros behind it."""
    output = tensor.new_zeros(b, max_seq_len, *tensor.shape[1:])
    ends = cu_seqlens.tolist()
    for row in range(b):
        output[row, : ends[row + 1] - ends[row]] = tensor[ends[row] : ends[row + 1]]
    return output


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, t: int) -> Tensor:
    """Return [t, N, D]: the sequences end to end."""
    output = tensor.new_zeros(t, *tensor.shape[2:])
    ends = cu_seqlens.tolist()
    for row in range(len(ends) - 1):
        output[ends[row] : ends[row + 1]] = tensor[row, : ends[row + 1] - ends[row]]
    return output


FUNCTIONS: Mapping[str, Callable[..., object]] = {
    function.__name__: function
    for function in (
        generic_gemm,
        te_general_grouped_gemm,
        rmsnorm_fwd,
        rmsnorm_bwd,
        fused_rope_forward,
        fused_rope_backward,
        convert_thd_to_bshd,
        convert_bshd_to_thd,
    )
}
