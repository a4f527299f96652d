"""The step that every layout repeats: a model, a mini-batch, and old log-probs that make ratios worth clipping.

Legend: T tokens, B responses.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_rl.config.schema import Run
from megatron_rl.data.types import Batch, Columns
from megatron_rl.errors import ConfigError
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.hf_mapping.rules import HFConfig

CASE, RUNS, RESULT = "case.safetensors", "run.json", "result.safetensors"
"""Files of the folder that a layout's ranks read and write."""

RESPONSES, LONGEST = 24, 40
"""Size of the mini-batch: enough that every rank of four has several rows, and experts differ in load."""


@dataclass(frozen=True)
class SizeOverrides:
    """A smaller model of the same family, with random weights; None keeps the size."""

    layers: int | None = None
    hidden: int | None = None
    experts: int | None = None

    @classmethod
    def parse(cls, text: str) -> "SizeOverrides":
        """Read ``layers=2,hidden=64,experts=8``.

        Raises:
            ConfigError: another key, or no number.
        """
        sizes: dict[str, int] = {}
        for word in text.split(","):
            key, _, value = word.partition("=")
            if key not in ("layers", "hidden", "experts") or not value.isdigit() or int(value) < 1:
                raise ConfigError(f"--shrink {text!r}: {word!r} is none of layers=N, hidden=N, experts=N")
            sizes[key] = int(value)
        return cls(**sizes)

    def config(self, hf: HFConfig) -> HFConfig:
        """Return the config.json of the smaller model; widths shrink in proportion to the hidden size."""
        small = dict(hf)
        if self.layers is not None:
            small["num_hidden_layers"] = self.layers
            small["mlp_only_layers"] = [layer for layer in hf.get("mlp_only_layers", ()) if layer < self.layers]
            if isinstance(hf.get("layer_types"), list):
                small["layer_types"] = hf["layer_types"][: self.layers]
        if self.hidden is not None:
            ratio = self.hidden / hf["hidden_size"]
            small["hidden_size"] = self.hidden
            small["head_dim"] = max(8, self.hidden // hf["num_attention_heads"] // 2 * 2)
            for width in ("intermediate_size", "moe_intermediate_size"):
                if width in hf:
                    small[width] = max(16, round(hf[width] * ratio / 16) * 16)
        if self.experts is not None:
            for name in ("num_experts", "num_local_experts", "n_routed_experts"):
                if name in hf:
                    small[name] = self.experts
        return small


def make_model(run: Run, shrink: SizeOverrides | None, folder: Path) -> str:
    """Return the folder of the model to prove with: the run's own, or a shrunk one with random weights."""
    hf = read_hf_config(Path(run.model.path))
    if shrink is None and list(Path(run.model.path).glob("*.safetensors")):
        return run.model.path
    small = (shrink or SizeOverrides()).config(hf)
    generator, family = torch.Generator().manual_seed(1), family_of(small)
    tensors = {}
    for name, shape in family.hf_shapes().items():
        noise = torch.randn(shape, generator=generator)
        # Norms around 1; matrices so that activations keep their size and routers and softmaxes are decided.
        tensors[name] = 1 + 0.1 * noise if len(shape) == 1 else noise * (2.0 / shape[-1]) ** 0.5
    for stack, parts in family.fused_parts(required=True).items():
        tensors[stack] = torch.stack([tensors.pop(part) for part in parts])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(small), encoding="utf-8")
    return str(folder)


def make_batch(vocab_size: int, seed: int) -> Batch:
    """Return a mini-batch of unequal responses: masked gaps, one response of one token, one without any."""
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(6, LONGEST, (RESPONSES,), generator=generator)
    prompts_B = torch.randint(2, 5, (RESPONSES,), generator=generator)
    total = int(lengths_B.sum())
    batch = Batch(lengths_B, {"input_ids_T": torch.randint(0, vocab_size, (total,), generator=generator)})
    place_T = torch.arange(total) - torch.repeat_interleave(batch.starts_B, lengths_B)
    prompts_T = torch.repeat_interleave(prompts_B, lengths_B)
    mask_T = place_T >= prompts_T
    mask_T &= ~((place_T > 15) & (place_T < 19))  # what a tool said
    response_T = batch.response_ids_T
    mask_T &= ~((response_T == 0) | ((response_T == 1) & (place_T != prompts_T)))
    return batch.add(
        {
            "loss_mask_T": mask_T,
            "advantages_B": torch.randn(RESPONSES, generator=generator, dtype=torch.float64),
            "noise_T": 0.3 * torch.randn(total, generator=generator, dtype=torch.float64),
        }
    )


def moved_scores(batch: Batch, scored: Columns) -> Columns:
    """Return the reference's scores as an old policy's and an engine's, moved by noise: ratios then differ from 1."""
    old_T = scored["old_logprobs_T"] + batch["noise_T"]
    return {**scored, "old_logprobs_T": old_T, "rollout_logprobs_T": old_T.clone()}
