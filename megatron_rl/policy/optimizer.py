"""megatron-core's Adam and learning-rate schedule, and access to the optimizer state per parameter."""

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
    """Return Adam for the chunks' parameters, sharded over data-parallel ranks if configured."""
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
"""Names of Adam's moments in torch, transformer-engine and apex."""


@dataclass(frozen=True)
class OptimizerPart:
    """This rank's optimizer state of one model parameter.

    Attributes:
        parameter: the model parameter.
        main: the tensor that Adam updates: the parameter, a float32 copy, or this rank's shard of either.
        start: index of the first element of the flattened parameter that ``main`` holds.
        is_shared_out: whether the elements are sharded over data-parallel ranks.
        inner: the torch optimizer that updates it.
        group: its parameter group there.
    """

    parameter: Tensor
    main: Tensor
    start: int
    is_shared_out: bool
    inner: torch.optim.Optimizer
    group: dict[str, object]

    @property
    def has_main_copy(self) -> bool:
        """Whether ``main`` is a separate float32 copy rather than the parameter's memory."""
        return self.main.dtype is not self.parameter.dtype

    def tensors(self) -> dict[str, Tensor]:
        """Return the main parameter, if it is a separate copy, and the moments, if there are any yet."""
        state = self.inner.state.get(self.main, {})
        main = {"main": self.main} if self.has_main_copy else {}
        return {**main, **{name: state[name] for name in MOMENTS if name in state}}

    def fill(self, values: Mapping[str, Tensor], updates: int) -> None:
        """Restore tensors that ``tensors`` returned after ``updates`` steps."""
        if self.has_main_copy:
            self.main.copy_(values["main"])
        if not updates:
            self.inner.state.pop(self.main, None)
            return
        state = {name: values[name].to(self.main.device, copy=True) for name in MOMENTS}
        if isinstance(self.inner, torch.optim.Adam | torch.optim.AdamW):
            state["step"] = torch.tensor(float(updates))
        else:
            self.group["step"] = updates  # fused optimizers have one step count per group
        self.inner.state[self.main] = state


def optimizer_parts(optimizer: MegatronOptimizer) -> dict[Tensor, OptimizerPart]:
    """Return this rank's optimizer state by model parameter; parameters without state on this rank are omitted."""
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
    """Yield (model parameter, main parameter) of one parameter group of a megatron-core optimizer."""
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
