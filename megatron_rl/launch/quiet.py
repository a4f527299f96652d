"""Filters for warnings and log messages of torch and megatron-core about their own code."""

import logging
import warnings

UPSTREAM_WARNINGS = (
    r"Apex is not installed",
    r"absl.logging is not installed",
    r"Transformer Engine and Apex are not installed",
    r".*`torch\.distributed\.\w+` is deprecated",  # called by megatron-core
    r"The \.grad attribute of a Tensor that is not a leaf",  # megatron-core's optimizer reads it for main parameters
    r"index_reduce\(\) is in beta",
    r"When using sequence parallelism it is recommended",  # a CUDA setting
    r"full scope is deprecated",
    r"MimoModelConfig is experimental",
    r"If you are using transformer_engine as the transformer implementation, the core_attn",
    r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",  # megatron-core's experts
    r".*recommended.*CUDA_DEVICE_MAX_CONNECTIONS",
)


UPSTREAM_MESSAGES = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # CUDA_HOME of a machine without a GPU
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
}
"""Logger -> beginning of its message that is not shown."""


def quiet_upstream() -> None:
    """Ignore these warnings and messages; call before torch or megatron-core is imported."""
    for message in UPSTREAM_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, start in UPSTREAM_MESSAGES.items():
        logging.getLogger(name).addFilter(lambda record, start=start: not record.getMessage().startswith(start))
