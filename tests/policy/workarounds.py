"""Measurements of megatron-core without one of this package's workarounds; for the tests and the table of the docs.

Each measurement returns the name of the exception, or the largest error: of a gradient relative to the largest
gradient, unless the description says otherwise.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.moe.moe_utils import group_limited_topk, topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rl.distributed.mesh import start_world
from megatron_rl.models.hf_mapping.rules import Family, HFConfig, Shard
from megatron_rl.policy import balance, engine, layers, model, routing_replay, upstream
from megatron_rl.policy.engine import Policy
from tests.minibatches import whole
from tests.policy import families
from tests.policy.test_parity import weighted
from tests.policy.test_replay import distance
from tests.policy.tiny import case, lonely_case, run_of, save_model
from tests.ranks import RankError, run_ranks

Result = float | str
RELEASES = ("0.16", "0.17", "0.18", "0.19")


@dataclasses.dataclass(frozen=True)
class Defect:
    """A defect of megatron-core that this package works around.

    Attributes:
        description: what is wrong, for the table of the docs.
        wrong_in: the releases in which it was measured.
        family: the model of ``families``, or "" where no model is built.
        ranks: number of ranks.
        parallel: the layout.
        disable: leaves the workaround out in this process; without a model, measures and returns the result.
        tokens: tokens per row.
        model: settings of ``model``.
        measure: which error is returned.
    """

    description: str
    wrong_in: tuple[str, ...]
    disable: Callable[[], Result | None]
    family: str = ""
    ranks: int = 1
    parallel: Mapping[str, object] = dataclasses.field(default_factory=dict)
    tokens: int = 128
    model: Mapping[str, object] = dataclasses.field(default_factory=dict)
    measure: str = "gradient"


def replace(holder: object, name: str, value: object) -> Callable[[], None]:
    """Return a function that sets an attribute in this process."""
    return lambda: setattr(holder, name, value)


def nothing(*_: object, **__: object) -> None:
    """Stand in for a workaround that returns nothing."""


def sequential_experts() -> None:
    """Use megatron-core's loop over experts."""
    layers.can_group = lambda config: False


def loop_with_upstream_marks() -> None:
    """Use megatron-core's loop over experts and its own marks for gradient reduction."""
    sequential_experts()
    model.mark_expert_parameters = nothing


def split_latent_projections() -> None:
    """Use megatron-core's latent attention, whose local layers split the down projections over tensor ranks."""
    layers.LatentAttention = MLASelfAttention
    found = engine.family_of

    def family_of(hf: HFConfig) -> Family:
        family = found(hf)
        mappings = [
            dataclasses.replace(mapping, rule=Shard(0))
            if mapping.megatron.endswith(("linear_q_down_proj.weight", "linear_kv_down_proj.weight"))
            else mapping
            for mapping in family.mappings
        ]
        return dataclasses.replace(family, mappings=tuple(mappings))

    engine.family_of = family_of


def token_scaled_balancing() -> None:
    """Leave the scale of the load-balancing loss to megatron-core."""
    made = balance.LoadBalancing.__init__

    def start(self: balance.LoadBalancing, chunks: list[torch.nn.Module]) -> None:
        made(self, chunks)
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.calculate_per_token_loss = True

    setattr(balance.LoadBalancing, "__init__", start)  # noqa: B010 (the type checker forbids it)


def refused(make: Callable[[], object]) -> Result:
    """Return the name of the exception that the call raises, else 0."""
    try:
        make()
    except (AssertionError, TypeError, ValueError) as error:
        return type(error).__name__
    return 0.0


def norm_under_sequence_parallelism() -> Result:
    """Build megatron-core's norm of the local spec as sequence parallelism needs it."""
    fields = ("layernorm_zero_centered_gamma", "persist_layer_norm", "memory_efficient_layer_norm")
    config = SimpleNamespace(**dict.fromkeys(fields, False), sequence_parallel=True, normalization="RMSNorm")
    return refused(lambda: WrappedTorchNorm(config, 8))


def biased_experts_over_ranks() -> Result:
    """Configure experts with biases that several ranks share."""
    fields = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_moe_experts": 4}
    parallel = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2, "sequence_parallel": True}
    return refused(lambda: TransformerConfig(**fields, **parallel, add_bias_linear=True))


def yarn_fields() -> Result:
    """Configure YaRN."""
    fields = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "yarn_rotary_scaling_factor": 4.0}
    return refused(lambda: TransformerConfig(**fields))


def llama3_constants() -> Result:
    """Configure the three other constants of Llama 3's rotary embedding."""
    known = inspect.signature(RotaryEmbedding.__init__).parameters
    return 0.0 if "rope_scaling_original_max_position_embeddings" in known or "low_freq_factor" in known else "absent"


def scores() -> Tensor:
    """Return random positive scores of 512 tokens for 16 experts."""
    return torch.rand(512, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def groups_by_their_two_best() -> Result:
    """Share of tokens with other experts than in DeepSeek-V3, which scores groups by their two best experts."""
    given = scores()
    _, found = group_limited_topk(given, 6, len(given), 16, 4, 2)
    groups = given.view(-1, 4, 4).topk(2, dim=-1).values.sum(-1).topk(2, dim=-1).indices
    mask = torch.zeros(len(given), 4).scatter(1, groups, 1).bool().repeat_interleave(4, dim=1)
    truth = given.masked_fill(~mask, -1).topk(6, dim=-1).indices
    return float((found.sort(1).values != truth.sort(1).values).any(1).double().mean())


def sigmoid_gates_unnormalized() -> Result:
    """Relative error of gates that should not be normalized (norm_topk_prob = false)."""
    logits = scores()
    found, _ = topk_routing_with_score_function(logits, 2, score_function="sigmoid")
    truth = logits.float().sigmoid().topk(2, dim=-1)
    truth_TE = torch.zeros_like(logits).scatter(1, truth.indices, truth.values.double())
    return float((found.double() - truth_TE).abs().max() / truth_TE.max())


def pickled_loader() -> Result:
    """Return where the function is defined that pickles of tensors name."""
    path = torch.storage._load_from_bytes.__code__.co_filename
    return "megatron" if "megatron" in path else 0.0


def replay_of_two_rows_recomputed() -> Result:
    """Relative gradient error of upstream's replay if two rows are in flight and the first is recomputed after both."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = [torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    given = [torch.rand(5, 4, generator=generator).topk(2, dim=1).indices for _ in range(2)]
    replay = RouterReplay()
    replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

    def layer(row: Tensor) -> Tensor:
        probs, _ = topk_routing_with_score_function(row @ weight, 2, router_replay=replay)
        return (probs.double() * torch.arange(1.0, 5.0, dtype=torch.float64)).sum()

    outs = []
    for row, route in zip(rows, given, strict=True):
        replay.set_target_indices(route)
        outs.append(torch.utils.checkpoint.checkpoint(layer, row, use_reentrant=False))
    torch.stack(outs).sum().backward()
    assert weight.grad is not None
    truth = torch.zeros_like(weight)
    for row, route in zip(rows, given, strict=True):
        replay.set_target_indices(route)
        truth += torch.autograd.grad(layer(row), weight)[0]
    return float((weight.grad - truth).abs().max() / truth.abs().max())


AUX = {"megatron": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}}
EVERY = RELEASES

DEFECTS: Mapping[str, Defect] = {
    "router_gemm": Defect(
        "without transformer-engine, the router's product reads a name that is not defined",
        ("0.16",),
        replace(upstream, "define_router_gemm", nothing),
        "qwen3_moe",
    ),
    "mocked_engine": Defect(
        "without transformer-engine, latent attention asks whether a layer is of a type that is a mock",
        ("0.16",),
        replace(upstream, "ignore_mocked_transformer_engine", nothing),
        "deepseek_v3",
    ),
    "latent_norms": Defect(
        "a norm of the key latents is refused where queries have no latents (q_lora_rank null)",
        ("0.19",),
        replace(upstream, "use_latent_norms_as_specified", nothing),
        "deepseek_v2",
    ),
    "first_ratio": Defect(
        "scoring and training add gates in different orders (top-8 of 64; error of log-probs in nats)",
        ("0.18", "0.19"),
        replace(routing_replay, "sort_experts", lambda values, experts: (values, experts)),
        "many_experts",
        measure="ratio",
    ),
    "norm_recompute": Defect(
        'without transformer-engine, recompute_modules = ["layernorm"] reads a name that is not defined',
        EVERY,
        replace(upstream, "define_fp8_state", nothing),
        "qwen3_moe",
        model={"recompute": "selective", "megatron": {"recompute_modules": ["layernorm"]}},
    ),
    "expert_marks": Defect(
        "tensor=2, expert_tensor=1, loop over experts: gradients of experts are summed over the wrong ranks",
        ("0.16", "0.17", "0.18"),
        loop_with_upstream_marks,
        "qwen3_moe",
        2,
        {"tensor": 2, "expert_tensor": 1},
    ),
    "latent_down": Defect(
        "tensor=2, local layers: latent attention's down projections lose a part of their gradient",
        EVERY,
        split_latent_projections,
        "deepseek_v3",
        2,
        {"tensor": 2},
    ),
    "biased_experts": Defect(
        "one rank: the loop over experts cannot train biases", EVERY, sequential_experts, "gpt_oss"
    ),
    "biased_shared": Defect(
        "tensor=2: the loop adds a bias of the experts on each rank (error of log-probs in nats)",
        EVERY,
        sequential_experts,
        "gpt_oss",
        2,
        {"tensor": 2},
        measure="logprobs",
    ),
    "shard_marks": Defect(
        "tensor=2: the gradient norm leaves out shards (relative error of the norm)",
        EVERY,
        replace(engine, "mark_shards", nothing),
        "qwen3_moe",
        2,
        {"tensor": 2},
        measure="norm",
    ),
    "overlap": Defect(
        "data=2, overlapped gradient reduction, several micro-batches: earlier gradients are counted twice",
        EVERY,
        replace(model, "no_sync_function", nothing),
        "qwen3_moe",
        2,
        {"overlap_grad_reduce": True},
        64,
    ),
    "balance_scale": Defect(
        "tensor=2, expert=2: scale of the load-balancing loss of rows with padding",
        EVERY,
        token_scaled_balancing,
        "qwen3_moe",
        2,
        {"tensor": 2, "expert": 2},
        model=AUX,
    ),
    "padding_mask": Defect(
        "tensor=2, pipeline=2, load-balancing loss: later stages do not split the padding mask",
        EVERY,
        replace(model, "split_padding_mask", lambda mask, group: mask),
        "qwen3_moe",
        4,
        {"tensor": 2, "expert": 2, "pipeline": 2},
        model=AUX,
    ),
    "norm": Defect("the local norm refuses sequence parallelism", EVERY, norm_under_sequence_parallelism),
    "biased_config": Defect("experts with biases on several ranks are refused", EVERY, biased_experts_over_ranks),
    "yarn": Defect("TransformerConfig lacks the fields of YaRN that GPTModel reads", EVERY, yarn_fields),
    "llama3": Defect(
        "only one of the four constants of Llama 3's rotary embedding is a setting", EVERY, llama3_constants
    ),
    "groups": Defect(
        "group-limited routing scores a group by topk // topk_group experts, DeepSeek-V3 by two (share of tokens with"
        " other experts, 6 of 16 from 2 of 4 groups)",
        EVERY,
        groups_by_their_two_best,
    ),
    "sigmoid": Defect(
        "gates of sigmoid routing are always normalized (relative error)", EVERY, sigmoid_gates_unnormalized
    ),
    "pickle": Defect(
        "importing megatron-core replaces the function that pickles of tensors name; servers do not know the new one",
        ("0.17", "0.18", "0.19"),
        pickled_loader,
    ),
    "replay": Defect(
        "the base class of routing replay takes the routes of the newest row when an older one is recomputed",
        EVERY,
        replay_of_two_rows_recomputed,
    ),
}


def step(folder: str, defect: Defect, alone: bool, disabled: bool) -> dict[str, Tensor]:
    """Return log-probs, gradients and gradient norm of one step."""
    if disabled:
        defect.disable()
    # The load-balancing loss of a row depends on its sequences, so rows must be equal in all layouts.
    train = {"tokens_per_microbatch": defect.tokens, "packing": not defect.model}
    parallel = {} if alone else defect.parallel
    run = run_of(Path(folder), parallel=parallel, model=defect.model, train=train)
    policy = Policy(run, start_world(60, deterministic=True), total_updates=1)
    batch = policy.local_part(case())
    scored = policy.compute_logprobs(batch)
    if defect.measure == "ratio":
        metrics = policy.forward_backward(batch.add(scored.as_old()), distance)
        return {"ratio": metrics.maxima["apart"]}
    if defect.parallel.get("overlap_grad_reduce"):  # it starts with the second batch, here one of more rows
        policy.forward_backward(policy.local_part(lonely_case()), weighted, whole_gradients=True)
    policy.forward_backward(batch, weighted, whole_gradients=True)
    gradients = {f"gradient.{name}": tensor.double().clone() for name, tensor in policy.gradients()}
    norm = torch.tensor(policy.optim_step().grad_norm)
    logprobs_T = whole(policy, batch, {"logprobs_T": scored.logprobs_T})["logprobs_T"]
    return {"logprobs": logprobs_T.double(), "norm": norm, **gradients}


def save(name: str, folder: Path) -> Path:
    """Write the model of a defect and return its folder."""
    if name == "many_experts":
        return save_model(folder, experts=64, experts_per_token=8)
    return families.save(name, folder)


def measured(defect: Defect, folder: Path, *, disabled: bool) -> Result:
    """Return the error with or without the workaround, or the name of the exception that a rank raises."""
    if not defect.family:
        result = defect.disable()
        assert result is not None
        return result
    try:
        found = run_ranks(step, defect.ranks, str(folder), defect, False, disabled, initialize=False)[0]
    except RankError as failure:
        return str(failure).strip().splitlines()[-1].partition(":")[0]
    if defect.measure == "ratio":
        return float(found["ratio"])
    return error(defect.measure, found, run_ranks(step, 1, str(folder), defect, True, False, initialize=False)[0])


def error(measure: str, found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Return the largest error of the main rank's results; see ``Defect.measure``."""
    if measure == "norm":
        return abs(float(found["norm"]) / float(truth["norm"]) - 1)
    if measure == "logprobs":
        return float((found["logprobs"] - truth["logprobs"]).abs().max())
    names = [name for name in truth if name.startswith("gradient.")]
    largest = max(float(truth[name].abs().max()) for name in names)
    return max(float((found[name] - truth[name]).abs().max()) for name in names) / largest
