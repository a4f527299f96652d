"""megatron-core's optimizer and learning-rate schedule, and access to the optimizer state per parameter."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_rl.config.schema import MegatronValue, Optimizer, Run
from megatron_rl.errors import ConfigError
from megatron_rl.policy.model import DTYPES
from megatron_rl.policy.upstream import RELEASE


def build_optimizer(run: Run, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Return the optimizer of the chunks' parameters: Adam, sharded over data-parallel ranks if configured, or Muon.

    Raises:
        ConfigError: ``optimizer.megatron`` has an unknown field, or the installed packages lack the optimizer.
    """
    config = OptimizerConfig(**optimizer_fields(run))
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)


def optimizer_fields(run: Run) -> dict[str, object]:
    """Return the fields of megatron-core's OptimizerConfig: this package's, then ``optimizer.megatron``.

    Muon orthogonalizes whole matrices (``muon_tp_mode = "duplicated"``), so that updates do not depend on the layout.

    Raises:
        ConfigError: ``optimizer.megatron`` has an unknown field, or Muon is not available.
    """
    settings, dtype = run.optimizer, DTYPES[run.model.dtype]
    known = {field.name: field.type for field in fields(OptimizerConfig)}
    if unknown := sorted(set(settings.megatron) - set(known)):
        raise ConfigError(f"optimizer.megatron has fields that OptimizerConfig does not know: {', '.join(unknown)}")
    if settings.megatron.get("optimizer") == "muon" and RELEASE < (0, 19):
        raise ConfigError('optimizer.megatron.optimizer = "muon" needs megatron-core 0.19; leave it out')
    return {
        "optimizer": "adam",
        "lr": settings.lr,
        "min_lr": settings.min_lr,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.beta1,
        "adam_beta2": settings.beta2,
        "adam_eps": settings.epsilon,
        "clip_grad": settings.clip_grad,
        "bf16": dtype is torch.bfloat16,
        "params_dtype": dtype,
        "use_distributed_optimizer": run.parallel.distributed_optimizer,
        "muon_tp_mode": "duplicated",
        **{name: _typed(name, value) for name, value in settings.megatron.items()},
    }


def _typed(name: str, value: MegatronValue) -> object:
    """Return the value of a field; a dtype is written as its name."""
    return getattr(torch, value) if name.endswith("_dtype") and isinstance(value, str) else value


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


ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of Adam's moments in torch, transformer-engine and apex."""

MUON_MOMENTS = ("momentum_buffer",)
"""Name of Muon's momentum in emerging-optimizers."""


@dataclass(frozen=True)
class OptimizerPart:
    """This rank's optimizer state of one model parameter.

    Attributes:
        parameter: the model parameter.
        main: the main parameter on this rank's device: the parameter, a float32 copy, or this rank's shard of either.
        updated: the tensor that ``inner`` updates: ``main``, or its copy in host memory.
        start: index of the first element of the flattened parameter that ``main`` holds.
        is_shared_out: whether the elements are sharded over data-parallel ranks.
        inner: the torch optimizer that updates it.
        group: its parameter group there.
    """

    parameter: Tensor
    main: Tensor
    updated: Tensor
    start: int
    is_shared_out: bool
    inner: torch.optim.Optimizer
    group: dict[str, object]

    @property
    def has_main_copy(self) -> bool:
        """Whether ``main`` is a separate float32 copy rather than the parameter's memory."""
        return self.main.dtype is not self.parameter.dtype

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the state tensors that have the shape of the parameter."""
        return MUON_MOMENTS if hasattr(self.inner, "orthogonalize") else ADAM_MOMENTS

    def tensors(self) -> dict[str, Tensor]:
        """Return the main parameter, if it is a separate copy, and the moments, if there are any yet."""
        state = self.inner.state.get(self.updated, {})
        main = {"main": self.main} if self.has_main_copy else {}
        return {**main, **{name: state[name] for name in self.moments if name in state}}

    def fill(self, values: Mapping[str, Tensor], updates: int) -> None:
        """Restore tensors that ``tensors`` returned after ``updates`` steps."""
        if self.has_main_copy:
            self.main.copy_(values["main"])
        if self.updated is not self.main:
            self.updated.copy_(self.main)
        if not updates:
            self.inner.state.pop(self.updated, None)
            return
        state = {name: values[name].to(self.updated.device, copy=True) for name in self.moments}
        if self.moments == MUON_MOMENTS:
            pass  # it counts no steps
        elif isinstance(self.inner, torch.optim.Adam | torch.optim.AdamW):
            state["step"] = torch.tensor(float(updates))
        else:
            self.group["step"] = updates  # fused optimizers have one step count per group
        self.inner.state[self.updated] = state


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
                updated, inner, inner_group = _updating(chained.optimizer, main, group)
                parts[parameter] = OptimizerPart(parameter, main, updated, start, shared_out, inner, inner_group)
    return parts


def _updating(
    optimizer: torch.optim.Optimizer, main: Tensor, group: dict[str, object]
) -> tuple[Tensor, torch.optim.Optimizer, dict[str, object]]:
    """Return the tensor, torch optimizer and group that update a main parameter, which may be in host memory."""
    if not isinstance(optimizer, HybridDeviceOptimizer):
        return main, optimizer, group
    updated = optimizer.param_to_inner_param[main]
    for inner in optimizer.sub_optimizers:
        for inner_group in inner.param_groups:
            if any(updated is parameter for parameter in inner_group["params"]):
                return updated, inner, inner_group
    raise AssertionError("each parameter is in one of the optimizers")


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
