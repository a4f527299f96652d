"""megatron-core's Adam and learning-rate schedule, from our config; and what it holds for each parameter."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_rl.config.schema import Optimizer, Run
from megatron_rl.policy.model import DTYPES


def build_optimizer(run: Run, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Return Adam over the chunks' parameters, sharded over data-parallel ranks if the run says so."""
    settings, dtype = run.optimizer, DTYPES[run.model.dtype]
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=run.parallel.distributed_optimizer,
    )
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)


def build_scheduler(settings: Optimizer, optimizer: MegatronOptimizer, total_updates: int) -> OptimizerParamScheduler:
    """Return the learning-rate schedule over all optimizer steps of the run."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr if settings.schedule != "constant" else settings.lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(total_updates, settings.warmup_steps + 1),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=max(total_updates, 1),
        wd_incr_style="constant",
    )


MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's, as torch, transformer-engine and apex name them."""


@dataclass(frozen=True)
class OptimizerPart:
    """What the optimizer holds on this rank for one parameter of the model.

    Attributes:
        parameter: the model's.
        main: what Adam steps: the parameter itself, a float32 copy, or this rank's share of the elements of either.
        start: first element of the parameter that ``main`` holds.
        is_shared_out: whether each data-parallel rank holds other elements.
        inner: the optimizer that steps it.
        group: its settings there.
    """

    parameter: Tensor
    main: Tensor
    start: int
    is_shared_out: bool
    inner: torch.optim.Optimizer
    group: dict[str, object]

    @property
    def has_own_main(self) -> bool:
        """Whether ``main`` is a copy with values of its own, and not the parameter's memory."""
        return self.main.dtype is not self.parameter.dtype

    def tensors(self) -> dict[str, Tensor]:
        """Return the main parameter, where it has values of its own, and the moments, once there are any."""
        state = self.inner.state.get(self.main, {})
        own = {"main": self.main} if self.has_own_main else {}
        return {**own, **{name: state[name] for name in MOMENTS if name in state}}

    def fill(self, values: Mapping[str, Tensor], updates: int) -> None:
        """Put back what ``tensors`` gave after ``updates`` steps."""
        if self.has_own_main:
            self.main.copy_(values["main"])
        if not updates:
            self.inner.state.pop(self.main, None)
            return
        state = {name: values[name].to(self.main.device, copy=True) for name in MOMENTS}
        if isinstance(self.inner, torch.optim.Adam | torch.optim.AdamW):
            state["step"] = torch.tensor(float(updates))
        else:
            self.group["step"] = updates  # the fused ones count for a whole group
        self.inner.state[self.main] = state


def optimizer_parts(optimizer: MegatronOptimizer) -> dict[Tensor, OptimizerPart]:
    """Return this rank's part of the optimizer, by parameter of the model; parameters without one are left out."""
    parts = {}
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        if chained.optimizer is None:
            continue
        shared_out = isinstance(chained, DistributedOptimizer)
        for number, group in enumerate(chained.optimizer.param_groups):
            for parameter, main in _pairs(chained, number, group):
                start = chained._get_model_param_range_map(parameter)["param"].start if shared_out else 0
                parts[parameter] = OptimizerPart(parameter, main, start, shared_out, chained.optimizer, group)
    return parts


def _pairs(
    chained: MegatronOptimizer, number: int, group: Mapping[str, list[Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (parameter of the model, main parameter) of one group of one of megatron-core's optimizers."""
    if isinstance(chained, DistributedOptimizer):
        yield from zip(chained.model_fp32_groups[number], chained.shard_fp32_groups[number], strict=True)
        yield from zip(
            chained.model_float16_groups[number], chained.shard_fp32_from_float16_groups[number], strict=True
        )
    elif isinstance(chained, Float16OptimizerWithFloat16Params):
        yield from zip(chained.float16_groups[number], chained.fp32_from_float16_groups[number], strict=True)
        yield from ((parameter, parameter) for parameter in chained.fp32_from_fp32_groups[number])
    else:
        yield from ((parameter, parameter) for parameter in group["params"])
