"""DeepSeek-V2, DeepSeek-V3 and Moonlight: latent attention, shared experts, dense first layers.

V3 (and Moonlight, which uses its model type) selects experts by sigmoid scores plus a bias, V2 by softmax scores.
DeepSeek-V2: arXiv 2405.04434; DeepSeek-V3: arXiv 2412.19437.
"""

from megatron_rl.errors import ConfigError
from megatron_rl.models.hf_mapping import blocks
from megatron_rl.models.hf_mapping.rules import Family, HFConfig, ParamMapping, Shard


def v2(hf: HFConfig) -> Family:
    """Return the family of a ``config.json`` whose ``model_type`` is ``deepseek_v2``."""
    blocks.reject(hf, norm_topk_prob=True, scoring_func="sigmoid")
    limited = hf.get("topk_method", "greedy") == "group_limited_greedy"
    routing = {
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": hf.get("routed_scaling_factor", 1.0),
        **(expert_groups(hf, best=1) if limited else {}),
    }
    return _family(hf, routing, has_bias=False)


def v3(hf: HFConfig) -> Family:
    """Return the family of a ``config.json`` whose ``model_type`` is ``deepseek_v3``."""
    blocks.reject(hf, scoring_func="softmax")
    return _family(hf, biased_routing(hf), has_bias=True)


def biased_routing(hf: HFConfig) -> dict[str, object]:
    """Return the fields of DeepSeek-V3's routing; the expert bias stays as in the checkpoint.

    Raises:
        ConfigError: ``norm_topk_prob`` is false; megatron-core always normalizes the gate weights of sigmoid routing.
    """
    if not hf.get("norm_topk_prob", True):
        raise ConfigError("norm_topk_prob is false in config.json; megatron-core always normalizes sigmoid routing")
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": hf.get("routed_scaling_factor", 1.0),
        **expert_groups(hf, best=2),
    }


def expert_groups(hf: HFConfig, *, best: int) -> dict[str, object]:
    """Return the fields of group-limited routing; empty if all groups are selected.

    Args:
        hf: config.json.
        best: the score of a group is the sum of its ``best`` highest expert scores.

    Raises:
        ConfigError: megatron-core would score groups differently; it uses topk // topk_group experts.
    """
    groups, chosen, topk = hf.get("n_group") or 1, hf.get("topk_group") or 1, hf["num_experts_per_tok"]
    if chosen >= groups:
        return {}
    if topk // chosen != best:
        raise ConfigError(
            f"topk_group {chosen} and num_experts_per_tok {topk} of config.json: megatron-core scores a group by its "
            f"{topk // chosen} best experts, {hf['model_type']} by {best}"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


def _family(hf: HFConfig, routing: dict[str, object], *, has_bias: bool) -> Family:
    blocks.reject(hf, attention_bias=True)
    layers, first, step = blocks.all_layers(hf), hf.get("first_k_dense_replace", 0), hf.get("moe_layer_freq", 1)
    sparse = tuple(layer for layer in layers if layer >= first and layer % step == 0)
    dense = tuple(layer for layer in layers if layer not in sparse)
    count = blocks.expert_count(hf, "n_routed_experts")
    width, base = hf["moe_intermediate_size"], float(str(blocks.rope_settings(hf)["rope_theta"]))
    shared = width * (hf.get("n_shared_experts") or 0)
    return Family(
        fields={
            **blocks.common_fields(hf),
            **latent_fields(hf),
            **blocks.moe_fields(hf, sparse, count=count, width=width),
            **routing,
            "moe_shared_expert_intermediate_size": shared or None,
        },
        mappings=(
            *blocks.embedding_and_head(hf),
            *blocks.layer_norms(hf),
            *latent_attention(hf),
            *blocks.mlp(hf, hf["intermediate_size"], dense),
            *blocks.router(hf, count, sparse),
            *(blocks.router_bias(count, sparse) if has_bias else ()),
            *blocks.experts(hf, count, width, sparse),
            *(blocks.mlp(hf, shared, sparse, "mlp.shared_experts.", "mlp.shared_experts.") if shared else ()),
        ),
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        rotary_base=base,
        tied=bool(hf.get("tie_word_embeddings", False)),
        dense_layers=frozenset(dense),
        fused=blocks.fused_experts(),
        passthrough=(*blocks.mtp_layers(hf), *blocks.ROTARY_BUFFERS),
    )


def latent_fields(hf: HFConfig) -> dict[str, object]:
    """Return the fields of multi-head latent attention and of its rotary embedding, unscaled or YaRN.

    Raises:
        ConfigError: the rotary embedding is scaled in another way.
    """
    rope = blocks.rope_settings(hf)
    kinds = {"default": "rope", "yarn": "yarn"}
    if rope["rope_type"] not in kinds:
        raise ConfigError(
            f"rope_type {rope['rope_type']!r} of config.json is not supported; supported: {', '.join(kinds)}"
        )
    fields: dict[str, object] = {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": hf.get("q_lora_rank"),
        "kv_lora_rank": hf["kv_lora_rank"],
        "qk_head_dim": hf["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": hf["qk_rope_head_dim"],
        "v_head_dim": hf["v_head_dim"],
        "rope_type": kinds[str(rope["rope_type"])],
        "rotary_base": float(str(rope["rope_theta"])),
        "rotary_scaling_factor": float(str(rope.get("factor", 1.0))),
    }
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings", hf["max_position_embeddings"])
        fields |= {
            "original_max_position_embeddings": original,
            "beta_fast": rope.get("beta_fast") or 32,
            "beta_slow": rope.get("beta_slow") or 1,
            "mscale": rope.get("mscale") or 1.0,
            "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
        }
    return fields


def latent_attention(hf: HFConfig) -> blocks.Mappings:
    """Return latent attention: down projections (replicated), norms, and up projections (sharded by head)."""
    heads, hidden, layers = hf["num_attention_heads"], hf["hidden_size"], blocks.all_layers(hf)
    nope, rope, value = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
    query_rank, rank = hf.get("q_lora_rank"), hf["kv_lora_rank"]

    def sharded(megatron: str, name: str, shape: tuple[int, int], dim: int = 0) -> ParamMapping:
        return ParamMapping(blocks.ATTENTION + megatron, (blocks.HF_ATTENTION + name,), Shard(dim), (shape,), layers)

    def replicated(megatron: str, name: str, shape: tuple[int, ...]) -> ParamMapping:
        return blocks.replicated(blocks.ATTENTION + megatron, blocks.HF_ATTENTION + name, (shape,), layers)

    query: tuple[ParamMapping, ...] = (
        sharded("linear_q_proj.weight", "q_proj.weight", (heads * (nope + rope), hidden)),
    )
    if query_rank:
        query = (
            replicated("linear_q_down_proj.weight", "q_a_proj.weight", (query_rank, hidden)),
            replicated("q_layernorm.weight", "q_a_layernorm.weight", (query_rank,)),
            sharded("linear_q_up_proj.weight", "q_b_proj.weight", (heads * (nope + rope), query_rank)),
        )
    return (
        *query,
        replicated("linear_kv_down_proj.weight", "kv_a_proj_with_mqa.weight", (rank + rope, hidden)),
        replicated("kv_layernorm.weight", "kv_a_layernorm.weight", (rank,)),
        sharded("linear_kv_up_proj.weight", "kv_b_proj.weight", (heads * (nope + value), rank)),
        sharded("linear_proj.weight", "o_proj.weight", (hidden, heads * value), dim=1),
    )
