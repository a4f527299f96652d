"""A tiny random Qwen3-MoE, as transformers makes it, and one step of it by transformers' own autograd."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_rl.config.schema import Run
from megatron_rl.data.types import Batch
from megatron_rl.prove.case import make_batch

VOCABULARY = 18


def save_model(
    folder: Path, *, tied: bool = False, vocabulary: int = VOCABULARY, experts: int = 8, experts_per_token: int = 2
) -> Path:
    """Write a random checkpoint whose routers and softmaxes are decided, and return its folder."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=experts,
        num_experts_per_tok=experts_per_token,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        mlp_only_layers=[1],
    )
    model = Qwen3MoeForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.08 * noise)
    model.save_pretrained(folder)
    return folder


def run_of(path: Path, **changes: Mapping[str, object]) -> Run:
    """Return a run on the model; keyword arguments are sections."""
    model = {"path": str(path), **changes.get("model", {})}
    return Run.model_validate({"train": {"tokens_per_microbatch": 128}, **changes, "model": model})


def case() -> Batch:
    """Return a mini-batch with a random weight for every log-prob and entropy: any gradient error shows."""
    batch = make_batch(VOCABULARY, seed=3)
    generator = torch.Generator().manual_seed(5)
    total = int(batch.lengths_B.sum())
    columns = {
        "weights_T": torch.randn(total, generator=generator, dtype=torch.float64),
        "extra_places_T": torch.arange(total),
        "extra_entropy_weights_T": torch.randn(total, generator=generator, dtype=torch.float64),
    }
    unused = dict.fromkeys(("old_logprobs_T", "advantages_T", "response_shares_T"), torch.zeros(total))
    return batch.add({**columns, **unused})


def lonely_case() -> Batch:
    """Return one response of four tokens: most experts get none, and most ranks have nothing to train."""
    batch = case().select([3])
    place_T = torch.arange(int(batch.lengths_B))
    batch = batch.add({"loss_mask_T": (place_T >= 2) & (place_T < 4)})
    kept = place_T < 4
    return Batch(torch.tensor([4]), {n: c[kept] if n.endswith("_T") else c for n, c in batch.columns.items()})


def by_transformers(folder: Path, batch: Batch) -> dict[str, Tensor]:
    """Return log-probs, entropies, loss and gradients (under on-disk names), in float64, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    total = int(batch.lengths_B.sum())
    logprobs_T, entropies_T = torch.zeros(total, dtype=torch.float64), torch.zeros(total, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for start, length in zip(batch.starts_B.tolist(), batch.lengths_B.tolist(), strict=True):
        ids = batch["input_ids_T"][start : start + length]
        logits = model(ids[None]).logits[0, :-1]
        if "mask_ids_T" in batch:
            logits = masked(logits, batch["mask_ids_T"][start + 1 : start + length], ids[1:])
        logs = torch.log_softmax(logits, dim=-1).clamp(min=-1e4)  # p log p = 0 at p = 0
        mask = batch["loss_mask_T"][start + 1 : start + length]
        chosen = logs.gather(1, ids[1:, None])[:, 0] * mask
        entropy = -(logs.exp() * logs).sum(-1) * mask
        place = slice(start + 1, start + length)
        logprobs_T[place], entropies_T[place] = chosen.detach(), entropy.detach()
        loss = (
            loss
            + (batch["weights_T"][place] * chosen).sum()
            + (batch["extra_entropy_weights_T"][place] * entropy).sum()
        )
    loss.backward()
    gradients = {f"gradient.{name}": value for name, value in _on_disk(dict(model.named_parameters())).items()}
    return {"logprobs_T": logprobs_T, "entropies_T": entropies_T, "loss": loss.detach(), **gradients}


def masked(logits_TV: Tensor, mask_ids_TQ: Tensor, ids_T: Tensor) -> Tensor:
    """Return the logits, at -inf outside of the kept ids and of the token itself; rows of -1 are not restricted."""
    for row_V, kept_Q, token_id in zip(kept := logits_TV.detach().clone(), mask_ids_TQ, ids_T, strict=True):
        allowed = [i for i in kept_Q.tolist() if i >= 0]
        if allowed:
            others = torch.ones_like(row_V, dtype=torch.bool)
            others[[*allowed, int(token_id)]] = False
            row_V[others] = -torch.inf
    return torch.where(kept.isinf(), kept, logits_TV)


def _on_disk(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Return gradients with fused experts taken apart, as the file has them."""
    gradients: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        if "experts" not in name:
            gradients[name] = parameter.grad
            continue
        for expert, gradient in enumerate(parameter.grad):
            prefix = f"{name.rpartition('.')[0]}.{expert}."
            if name.endswith("down_proj"):
                gradients[f"{prefix}down_proj.weight"] = gradient
            else:
                gradients[f"{prefix}gate_proj.weight"], gradients[f"{prefix}up_proj.weight"] = gradient.chunk(2)
    return gradients
