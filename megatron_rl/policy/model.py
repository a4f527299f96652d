"""Builds the policy network: megatron-core's GPTModel with a head that returns log-probs and entropies, not logits."""

import dataclasses
from collections.abc import Mapping
from enum import Enum

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_rl.config.schema import Run
from megatron_rl.distributed.mesh import Mesh
from megatron_rl.errors import ConfigError
from megatron_rl.models.hf_mapping.rules import Family
from megatron_rl.ops.head import head_logprobs_entropies
from megatron_rl.policy.backends import PLAIN_VARIABLE, Backends, backends_for, fusions
from megatron_rl.policy.experts import skip_second_sort
from megatron_rl.policy.layers import block_spec
from megatron_rl.policy.rows import PackedRow
from megatron_rl.policy.upstream import mark_expert_parameters, no_sync_function, split_padding_mask

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclasses.dataclass
class YarnConfig(TransformerConfig):
    """TransformerConfig with YaRN settings (arXiv 2309.00071), which GPTModel reads but TransformerConfig lacks.

    megatron-core's ``YarnRotaryEmbedding`` documents them.
    """

    position_embedding_type: str = "yarn"
    yarn_rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 1.0
    yarn_mscale_all_dim: float = 0.0
    yarn_correction_range_round_to_int: bool = True


class PolicyModel(GPTModel):
    """GPTModel whose last stage gives [2, R]: log-probs and entropies of the R trained tokens, in float32 or float64.

    Only positions that predict a trained token are projected. Call it with ``labels`` the R target tokens and
    ``loss_mask`` the R positions.
    """

    head_temperature = 1.0
    head_vocab_size = 0

    def _preprocess(
        self,
        *args: object,
        position_ids: Tensor,
        packed_seq_params: PackedRow,
        padding_mask: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[object, ...]:
        inputs = {"position_ids": position_ids, "packed_seq_params": packed_seq_params, "padding_mask": padding_mask}
        prepared = super()._preprocess(*args, **inputs, **kwargs)
        if packed_seq_params.is_plain:
            # Rotate the whole row at once; for packed rows, megatron-core loops over sequences in each layer.
            angles = self.rotary_pos_emb.get_emb(packed_seq_params.max_seqlen_q)
            angles = angles[0] if isinstance(angles, tuple) else angles  # YaRN also returns a scale
            prepared = (prepared[0], angles[position_ids[0]], *prepared[2:])
        if padding_mask is not None and self.config.sequence_parallel and not self.pre_process:
            prepared = (*prepared[:5], split_padding_mask(padding_mask, self.pg_collection.tp), *prepared[6:])
        return prepared

    def _postprocess(
        self,
        hidden_states: Tensor,
        *args: object,
        labels: Tensor,
        loss_mask: Tensor,
        packed_seq_params: PackedRow,
        **kwargs: object,
    ) -> Tensor:
        if not self.post_process:
            return hidden_states
        tensor_group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_T1H = gather_from_sequence_parallel_region(hidden_states, group=tensor_group)
        else:
            hidden_T1H = copy_to_tensor_model_parallel_region(hidden_states, group=tensor_group)
        tied = self.share_embeddings_and_output_weights
        logprobs_R, entropies_R = head_logprobs_entropies(
            hidden_T1H.squeeze(1)[loss_mask],
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            labels,
            temperature=self.head_temperature,
            group=tensor_group,
            vocab_size=self.head_vocab_size,
            mask_ids_RQ=packed_seq_params.mask_ids_RQ,
        )
        return torch.stack([logprobs_R, entropies_R])


def backends_of(run: Run, mesh: Mesh) -> Backends:
    """Return the selected implementations for this run on this rank's device."""
    return backends_for(DTYPES[run.model.dtype], mesh.world.device.type)


def transformer_config(run: Run, family: Family, mesh: Mesh) -> TransformerConfig:
    """Return megatron-core's configuration: the family's fields, this package's, then ``model.megatron``.

    Raises:
        ConfigError: ``model.megatron`` has an unknown field.
    """
    dtype, parallel = DTYPES[run.model.dtype], run.parallel
    on_cuda = mesh.world.device.type == "cuda"
    kind = YarnConfig if "yarn_rotary_scaling_factor" in family.fields else TransformerConfig
    kind = MLATransformerConfig if family.has_latent_attention else kind
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(run.model.megatron) - known):
        raise ConfigError(f"model.megatron has fields that TransformerConfig does not know: {', '.join(unknown)}")
    interleaved = parallel.virtual_pipeline > 1
    fields: dict[str, object] = {
        **family.fields,
        **layout_fields(run),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": _finalize_sums,
        "use_cpu_initialization": not on_cuda,
        "perform_initialization": False,
        "batch_p2p_comm": not interleaved,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_sync": on_cuda,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_enable_routing_replay": run.rollout.routing_replay != "none",
        "moe_router_dtype": "fp64" if dtype is torch.float64 else "fp32",
        "deterministic_mode": on_cuda and torch.are_deterministic_algorithms_enabled(),
        **fusions(backends_of(run, mesh), family.fields),
        **_context_exchange(run, family, backends_of(run, mesh)),
        **RECOMPUTE[run.model.recompute],
    }
    return _built(kind, {**fields, **_with_enums(kind, run.model.megatron)}, backends_of(run, mesh))


def _with_enums(kind: type[TransformerConfig], values: Mapping[str, object]) -> dict[str, object]:
    """Return the values of ``model.megatron``, names of enum members replaced by the members.

    megatron-core compares ``attention_backend`` with members and would ignore a name.

    Raises:
        ConfigError: an enum has no member of that name.
    """
    result = dict(values)
    for field in dataclasses.fields(kind):
        name = values.get(field.name)
        if not isinstance(field.default, Enum) or not isinstance(name, str):
            continue
        members = type(field.default).__members__
        if name not in members:
            raise ConfigError(f"model.megatron.{field.name} is {name!r}; write one of {', '.join(members)}")
        result[field.name] = members[name]
    return result


def _context_exchange(run: Run, family: Family, paths: Backends) -> dict[str, object]:
    """Return how context-parallel ranks exchange keys and values in transformer-engine's attention.

    Point to point (the default) is refused for sinks and windows. All-to-all gives each rank whole sequences of a part
    of the heads.
    """
    needs_whole_sequences = family.attention_window or family.fields.get("softmax_type") == "learnable"
    return {"cp_comm_type": "a2a"} if paths.engine and run.parallel.context > 1 and needs_whole_sequences else {}


def _built(kind: type[TransformerConfig], fields: dict[str, object], paths: Backends) -> TransformerConfig:
    """Return the configuration; it may have biased experts sharded over several ranks, which megatron-core rejects.

    Raises:
        ConfigError: the model has such experts and ``GroupedExperts`` is not used.
    """
    ranks = fields["expert_tensor_parallel_size"]
    if not fields["add_bias_linear"] or (paths.engine and ranks == 1):
        return kind(**fields)
    if not paths.grouped:
        raise ConfigError(
            f"parallel.expert_tensor is {ranks}, and the model's experts have biases: transformer-engine's layers "
            "would add a bias once on each of these ranks; write expert_tensor = 1, and an expert axis above 1"
            if paths.engine
            else "the model's experts have biases, which megatron-core's loop over experts cannot train; leave experts "
            f"out of {PLAIN_VARIABLE}"
        )
    config = kind(**{**fields, "expert_tensor_parallel_size": 1})
    config.expert_tensor_parallel_size = ranks
    return config


RECOMPUTE: Mapping[str, Mapping[str, object]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def layout_fields(run: Run) -> dict[str, object]:
    """Return the parallel sizes under TransformerConfig's names, with defaults resolved."""
    parallel = run.parallel
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "sequence_parallel": parallel.sequence_parallel,
    }


def build_chunks(run: Run, family: Family, mesh: Mesh) -> list[DistributedDataParallel]:
    """Build this rank's model chunks, one per virtual pipeline stage, in megatron-core's data-parallel wrapper."""
    config = transformer_config(run, family, mesh)
    chunks = []
    for stage in range(run.parallel.virtual_pipeline):
        vp_stage = stage if run.parallel.virtual_pipeline > 1 else None
        chunk = _build_chunk(run, family, config, backends_of(run, mesh), vp_stage).to(mesh.world.device)
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.bf16,
        overlap_grad_reduce=run.parallel.overlap_grad_reduce,
        overlap_param_gather=bool(run.optimizer.megatron.get("overlap_param_gather")),
        use_distributed_optimizer=run.parallel.distributed_optimizer,
    )
    wrapped = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=n > 0) for n, chunk in enumerate(chunks)]
    if run.parallel.overlap_grad_reduce:
        config.no_sync_func = no_sync_function(wrapped)
    return wrapped


def _build_chunk(
    run: Run, family: Family, config: TransformerConfig, paths: Backends, vp_stage: int | None
) -> PolicyModel:
    tensor = run.parallel.tensor
    model = PolicyModel(
        config=config,
        transformer_layer_spec=block_spec(config, paths, vp_stage),
        vocab_size=-(-family.vocab_size // tensor) * tensor,
        max_sequence_length=family.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=family.tied,
        position_embedding_type="rope",
        rotary_base=int(family.rotary_base),
        rotary_percent=family.rotary_percent,
        rope_scaling=family.rotary_factor is not None,
        rope_scaling_factor=family.rotary_factor or 1.0,
        vp_stage=vp_stage,
    )
    skip_second_sort(model)
    mark_expert_parameters(model, config)
    _average_sink_gradients(model, config)
    model.head_temperature = run.rollout.sampling.temperature
    model.head_vocab_size = family.vocab_size
    return model


def _average_sink_gradients(model: PolicyModel, config: TransformerConfig) -> None:
    """Divide gradients of transformer-engine's sinks by the context-parallel size.

    In its all-to-all exchange every context rank receives the whole gradient of every sink, and the data-parallel
    reduction adds those of all context ranks (transformer-engine 2.20.2).
    """

    def average(gradient: Tensor) -> Tensor:
        return gradient / config.context_parallel_size

    if config.context_parallel_size > 1 and config.cp_comm_type == "a2a":
        for name, parameter in model.named_parameters():
            if name.endswith("core_attention.softmax_offset"):
                parameter.register_hook(average)


def _finalize_sums(model: list[DistributedDataParallel], num_tokens: Tensor | None = None, **kwargs: object) -> None:
    """Reduce gradients as plain sums: the loss has its global denominators, so no token count divides it."""
    finalize_model_grads(model, None, **kwargs)
