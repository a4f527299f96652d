"""Which attention kernel transformer-engine would use for a run, as far as this machine can tell."""

from collections.abc import Iterator

from megatron_rl.config.schema import Run
from megatron_rl.distributed.mesh import is_deterministic
from megatron_rl.launch.planning.layout import ParallelLayout
from megatron_rl.launch.planning.model_sizes import ModelSizes
from megatron_rl.policy.engine_attention import AttentionShape, selected_kernel, why_not_asked

GIB = 2**30
KERNELS = {
    "flash": "flash-attn",
    "fused": "cuDNN's fused attention",
    "unfused": "unfused attention, which keeps the shares of all pairs of tokens",
}


def attention_shapes(
    run: Run, layout: ParallelLayout, sizes: ModelSizes, longest: int
) -> Iterator[tuple[str, AttentionShape]]:
    """Yield (label, shape) of each kind of layer, on a GPU.

    Args:
        run: the configuration.
        layout: sizes of the mesh axes.
        sizes: sizes of the model.
        longest: maximum sequence length, in tokens.
    """
    tokens = max(run.train.tokens_per_microbatch, longest) if run.train.packing else longest
    windows = {0} if sizes.windowed_layers < sizes.layers else set()
    windows |= {sizes.window} if sizes.windowed_layers else set()
    for window in sorted(windows):
        yield (
            f"layers with a window of {window} tokens" if window else "layers that see all tokens before",
            AttentionShape(
                heads=sizes.heads // layout.tensor,
                kv_heads=max(sizes.kv_heads // layout.tensor, 1),
                query_dim=sizes.query_dim,
                value_dim=sizes.value_dim,
                window=window,
                sinks=sizes.attention_sinks,
                sequences=-(-tokens // longest),
                longest=longest,
                tokens=tokens,
                context=layout.context,
                deterministic=is_deterministic(run.train.deterministic, on_gpus=True),
            ),
        )


def describe_attention(run: Run, layout: ParallelLayout, sizes: ModelSizes, longest: int) -> Iterator[str]:
    """Yield one line per kind of layer: the kernel and its memory, or why nobody was asked."""
    if run.model.dtype != "bfloat16":
        yield f"attention: a {run.model.dtype} model does not use transformer-engine"
        return
    if (reason := why_not_asked()) is not None:
        yield f"attention: transformer-engine was not asked which kernel it would select: {reason}"
        return
    for label, shape in attention_shapes(run, layout, sizes, longest):
        kernel = selected_kernel(shape)
        if kernel is None:
            yield f"attention of {label}: none; {NO_KERNEL}"
            continue
        cost = f": {shape.unfused_bytes / GIB:.1f} GiB per layer and row" if kernel == "unfused" else ""
        yield f"attention of {label}: {KERNELS[kernel]}{cost}"


NO_KERNEL = (
    "transformer-engine supports none for this model, dtype and layout (NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 prints why);"
    " write train.deterministic = false or context = 1, or install flash-attn"
)


def attention_problems(run: Run, layout: ParallelLayout, sizes: ModelSizes, longest: int) -> Iterator[str]:
    """Yield the kinds of layers for which transformer-engine has no kernel on this machine's GPU."""
    if run.model.dtype != "bfloat16" or why_not_asked() is not None:
        return
    for label, shape in attention_shapes(run, layout, sizes, longest):
        if selected_kernel(shape) is None:
            yield f"attention of {label}: {NO_KERNEL}"
