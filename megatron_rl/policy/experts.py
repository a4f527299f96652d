"""All experts of a layer as grouped matrix products, with the parameter names of megatron-core's sequential experts.

Legend: T tokens sent to this rank's experts, sorted by expert; E experts, H hidden size, F their width on this rank;
I and O inputs and outputs of one of the two matrices.

The matrices are at equal distances in memory, so that one strided view [E, O, I] covers all of them without a copy:
first as allocated here, then in the buffers to which megatron-core's data-parallel wrapper moves parameters and
gradients. The wrapper fills buffers from the last parameter to the first, so the last expert is registered first. If
the distance is not constant, at the boundary of two of the wrapper's buckets, the matrices are stacked at each use.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ALIGNMENT_BYTES = 16
"""Alignment that the grouped kernel requires of every row."""


class _ExpertLinear(nn.Module):
    """One matrix of one expert, with an optional bias, in preallocated memory."""

    def __init__(self, memory: Tensor, bias: Tensor, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(memory)
        self.bias = nn.Parameter(bias) if config.add_bias_linear else None


class _Expert(nn.Module):
    def __init__(self, fc1: _ExpertLinear, fc2: _ExpertLinear) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = fc1, fc2


class StridedView:
    """A strided view of equally shaped tensors, cached until their addresses change."""

    def __init__(self) -> None:
        self._place: tuple[int, int] = (0, 0)
        self._view: Tensor | None = None

    def view(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Return the view of these tensors, or None if they are not at equal distances."""
        place = (tensors[0].data_ptr(), tensors[-1].data_ptr())
        if place != self._place:
            self._place, self._view = place, strided(tensors)
        return self._view


class ExpertMatrices:
    """The same matrix of all experts, [E, O, I], and megatron-core's main gradient of it."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = list(weights)
        self._values, self._gradients = StridedView(), StridedView()

    def read(self) -> Tensor:
        """Return the values, detached."""
        view = self._values.view(self.weights)
        return torch.stack(tuple(self.weights)).detach() if view is None else view

    def add_gradient(self, gradient_EOI: Tensor) -> None:
        """Add to megatron-core's main gradients in one operation, and mark them as added for its hook."""
        mains = [main for weight in self.weights if (main := getattr(weight, "main_grad", None)) is not None]
        view = self._gradients.view(mains) if len(mains) == len(self.weights) else None
        if view is not None:
            view.add_(gradient_EOI)
            for weight in self.weights:
                setattr(weight, "grad_added_to_main_grad", True)  # noqa: B010 (no attribute of Parameter)


class GroupedExperts(MegatronModule):
    """This rank's experts: gate and up matrix (``linear_fc1``) and down matrix (``linear_fc2``) of each.

    There is no communication here: the dispatcher gathers tokens over expert-tensor ranks before and sums after. The
    bias of a down matrix, which is replicated on these ranks, is therefore added on the first one only.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,  # passed by megatron-core 0.17 and later
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None, "megatron's layer gives its groups"
        assert config.moe_ffn_hidden_size is not None, "megatron's configuration sets it"
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        biases = (2 * width, hidden) if config.add_bias_linear else (0, 0)
        sizes = (2 * width * hidden, biases[0], width * hidden, biases[1])
        memory = torch.empty(
            num_local_experts, sum(sizes), dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        parts = [row.split(sizes) for row in memory]
        fc1 = [_ExpertLinear(weight.view(2 * width, hidden), bias, config) for weight, bias, _, _ in parts]
        fc2 = [_ExpertLinear(weight.view(hidden, width), bias, config) for _, _, weight, bias in parts]
        self.adds_bias = pg_collection.expt_tp.rank() == 0
        self.local_experts = nn.Module()
        for number in reversed(range(num_local_experts)):
            self.local_experts.add_module(str(number), _Expert(fc1[number], fc2[number]))
        self.matrices = tuple(ExpertMatrices([matrix.weight for matrix in side]) for side in (fc1, fc2))
        self.biases = tuple([matrix.bias for matrix in side if matrix.bias is not None] for side in (fc1, fc2))

    def forward(self, tokens_TH: Tensor, counts_E: Tensor, probs_T: Tensor) -> tuple[Tensor, None]:
        """Return (each expert's output for its tokens times the gate, None): megatron-core's signature."""
        ends_E = counts_E.cumsum(0).to(device=tokens_TH.device, dtype=torch.int32, non_blocking=True)
        inner = grouped_linear(tokens_TH, ends_E, self.matrices[0])
        if self.config.add_bias_linear:
            inner = inner + bias_per_token(self.biases[0], counts_E, len(inner))
        if self.config.bias_activation_fusion:
            gated_TF = weighted_bias_swiglu_impl(inner, None, probs_T[:, None])
        else:
            gated_TF = (gated(inner, self.config) * probs_T[:, None]).to(inner.dtype)
        out_TH = grouped_linear(gated_TF, ends_E, self.matrices[1])
        if self.config.add_bias_linear:
            bias_TH = bias_per_token(self.biases[1], counts_E, len(out_TH))
            # Other ranks add zero with the same gradient, so that all copies of the bias stay equal.
            bias_TH = bias_TH if self.adds_bias else bias_TH - bias_TH.detach()
            out_TH = out_TH + (bias_TH * probs_T[:, None]).to(out_TH.dtype)
        return out_TH, None


def bias_per_token(biases: Sequence[Tensor], counts_E: Tensor, total: int) -> Tensor:
    """Return the bias of the expert of each of ``total`` tokens, [T, O]."""
    biases_EO = torch.stack(tuple(biases))
    return biases_EO.repeat_interleave(counts_E.to(biases_EO.device), dim=0, output_size=total)


def gated(inner: Tensor, config: TransformerConfig) -> Tensor:
    """Return activation(gate) * up, [T, F], from the concatenated halves, [T, 2 F]."""
    gate_TF, up_TF = inner.chunk(2, -1)
    if (limit := config.activation_func_clamp_value) is not None:
        gate_TF, up_TF = gate_TF.clamp(max=limit), up_TF.clamp(-limit, limit)
    if config.glu_linear_offset:
        up_TF = up_TF + config.glu_linear_offset
    return config.activation_func(gate_TF) * up_TF


def skip_second_sort(model: nn.Module) -> None:
    """Remove two redundant permutations of all tokens from megatron-core's dispatchers if one rank has all experts.

    Dispatchers sort by expert, send, and sort again because tokens came from several ranks. With one rank, the second
    sort and its inverse are identities; a dispatcher skips both if it has a single local expert.
    """
    for layer in model.modules():
        dispatcher = layer.token_dispatcher if isinstance(layer, MoELayer) else None
        if isinstance(dispatcher, MoEAlltoAllTokenDispatcher) and dispatcher.ep_size == dispatcher.tp_size == 1:
            dispatcher.num_local_experts = 1


def can_group(config: TransformerConfig) -> bool:
    """Return whether ``GroupedExperts`` supports this configuration; if not, megatron-core's experts run."""
    if config.bias_activation_fusion and (config.add_bias_linear or config.activation_func is not F.silu):
        return False
    return config.gated_linear_unit and not (
        config.fp8 or config.fp4 or config.moe_latent_size or config.moe_apply_probs_on_input
    )


def grouped_linear(tokens_TI: Tensor, ends_E: Tensor, matrices: ExpertMatrices) -> Tensor:
    """Return each token times the matrix of its expert, [T, O].

    Args:
        tokens_TI: sorted by expert.
        ends_E: int32, where each expert's tokens end.
        matrices: the experts'.
    """
    return _GroupedLinear.apply(tokens_TI, ends_E, matrices, *matrices.weights)


class _Context(Protocol):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    matrices: ExpertMatrices

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep tensors for the backward pass."""


class _GroupedLinear(torch.autograd.Function):
    """The product and its gradients; saves only its inputs."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override] - the base takes anything
        ctx: _Context, tokens_TI: Tensor, ends_E: Tensor, matrices: ExpertMatrices, *_: Tensor
    ) -> Tensor:
        ctx.save_for_backward(tokens_TI, ends_E)
        ctx.matrices = matrices
        return grouped_product(tokens_TI, matrices.read().transpose(1, 2), ends_E)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override] - the base takes anything
        ctx: _Context, gradient_TO: Tensor
    ) -> tuple[Tensor | None, ...]:
        (tokens_TI, ends_E), matrices = ctx.saved_tensors, ctx.matrices
        gradient_TO = gradient_TO.contiguous()
        to_tokens = grouped_product(gradient_TO, matrices.read(), ends_E) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[3:]):
            return (to_tokens, None, None, *[None for _ in matrices.weights])
        gradient_EOI = grouped_product(gradient_TO.T, tokens_TI, ends_E)
        matrices.add_gradient(gradient_EOI)
        return (to_tokens, None, None, *gradient_EOI.unbind(0))


def grouped_product(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    """Return the product of each group's part: of [T, K] with [E, K, N], or of [M, T] with [T, N] to [E, M, N].

    Uses torch's grouped kernel; float64 and unaligned rows use a loop.
    """
    if not left.numel():  # no token came
        shape = (len(left), right.shape[-1]) if right.dim() == 3 else (len(ends_E), len(left), right.shape[-1])
        return left.new_zeros(shape)
    if left.dtype is not torch.float64 and all(_is_aligned(matrix) for matrix in (left, right)):
        return F.grouped_mm(left, right, offs=ends_E)
    bounds = [slice(first, last) for first, last in pairwise([0, *ends_E.tolist()])]
    if right.dim() == 3:
        return torch.cat([left[rows] @ matrix for rows, matrix in zip(bounds, right, strict=True)])
    return torch.stack([left[:, rows] @ right[rows] for rows in bounds])


def _is_aligned(matrix: Tensor) -> bool:
    jumps = [matrix.data_ptr(), *(stride * matrix.element_size() for stride in matrix.stride() if stride != 1)]
    return all(jump % ALIGNMENT_BYTES == 0 for jump in jumps)


def strided(matrices: Sequence[Tensor]) -> Tensor | None:
    """Return a view of matrices at equal, increasing distances in one storage; None if they are not."""
    first = matrices[0].detach()
    starts = [matrix.storage_offset() for matrix in matrices]
    distances = {after - before for before, after in pairwise(starts)}
    memories = {matrix.untyped_storage().data_ptr() for matrix in matrices}
    distance = distances.pop() if distances else first.numel()
    if distances or len(memories) > 1 or distance < first.numel() or not first.is_contiguous():
        return None
    return first.as_strided((len(matrices), *first.shape), (distance, *first.stride()))
