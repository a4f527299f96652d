"""megatron-core's Adam and learning-rate schedule, from our config; and their exact state as plain tensors."""

from collections.abc import Mapping

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
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


def _inner(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in chained if part.optimizer is not None]


def optimizer_tensors(optimizer: MegatronOptimizer) -> dict[str, Tensor]:
    """Return this rank's main parameters and Adam moments as named tensors, shared with the optimizer.

    The names count chained optimizers, groups and parameters in megatron's order, which depends only on the layout.
    """
    tensors = {}
    for number, inner in enumerate(_inner(optimizer)):
        for group_number, group in enumerate(inner.param_groups):
            for index, parameter in enumerate(group["params"]):
                prefix = f"optimizer.{number}.{group_number}.{index}"
                tensors[f"{prefix}.main"] = parameter.data
                for key, value in inner.state.get(parameter, {}).items():
                    tensors[f"{prefix}.{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


@torch.no_grad()
def load_optimizer_tensors(optimizer: MegatronOptimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave, bit for bit."""
    for number, inner in enumerate(_inner(optimizer)):
        for group_number, group in enumerate(inner.param_groups):
            for index, parameter in enumerate(group["params"]):
                prefix = f"optimizer.{number}.{group_number}.{index}."
                saved = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
                parameter.data.copy_(saved.pop("main"))
                if saved:
                    inner.state[parameter] = {
                        key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                        for key, value in saved.items()
                    }
