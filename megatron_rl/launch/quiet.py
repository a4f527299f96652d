"""What torch and megatron-core warn about themselves, and nobody here can change."""

import warnings


def quiet_upstream() -> None:
    """Silence what torch and megatron-core warn about themselves; call before either is imported."""
    for message in UPSTREAM_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


UPSTREAM_WARNINGS = (
    r"Apex is not installed",
    r"Transformer Engine and Apex are not installed",
    r".*`torch\.distributed\.\w+` is deprecated",  # megatron-core's calls
    r"The \.grad attribute of a Tensor that is not a leaf",  # megatron-core's optimizer looks at every main parameter
    r"index_reduce\(\) is in beta",
    r"When using sequence parallelism it is recommended",  # a CUDA setting
    r"full scope is deprecated",
    r"If you are using transformer_engine as the transformer implementation, the core_attn",
    r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",  # its experts
    r".*recommended.*CUDA_DEVICE_MAX_CONNECTIONS",
)
