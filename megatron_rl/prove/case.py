"""The training step that every layout repeats: a model, a mini-batch, and old log-probs that make ratios clip.

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
"""Files in the folder that the ranks of a layout read and write."""

NUM_RESPONSES, MAX_LENGTH = 24, 40
"""Size of the mini-batch: large enough for several rows per rank on four ranks, and for unequal load of experts."""


@dataclass(frozen=True)
class SizeOverrides:
    """Sizes of a smaller model of the same family, with random weights. None keeps the original size."""

    layers: int | None = None
    hidden: int | None = None
    experts: int | None = None

    @classmethod
    def parse(cls, text: str) -> "SizeOverrides":
        """Parse ``layers=2,hidden=64,experts=8``.

        Raises:
            ConfigError: a key is unknown, or a value is not a positive number.
        """
        sizes: dict[str, int] = {}
        for word in text.split(","):
            key, _, value = word.partition("=")
            if key not in ("layers", "hidden", "experts") or not value.isdigit() or int(value) < 1:
                raise ConfigError(f"--shrink {text!r}: {word!r} is not one of layers=N, hidden=N, experts=N")
            sizes[key] = int(value)
        return cls(**sizes)

    def apply(self, hf: HFConfig) -> HFConfig:
        """Return the config.json of the smaller model. Widths are scaled in proportion to the hidden size."""
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


def make_model(run: Run, sizes: SizeOverrides | None, folder: Path) -> str:
    """Return the model folder of the run; with ``sizes``, or if it has no weights, a new one with random weights."""
    hf = read_hf_config(Path(run.model.path))
    if sizes is None and list(Path(run.model.path).glob("*.safetensors")):
        return run.model.path
    small = (sizes or SizeOverrides()).apply(hf)
    generator, family = torch.Generator().manual_seed(1), family_of(small)
    tensors = {}
    for name, shape in family.hf_shapes().items():
        noise = torch.randn(shape, generator=generator)
        # Norms around 1; matrices scaled so that activations keep their size and routing is decisive.
        tensors[name] = 1 + 0.1 * noise if len(shape) == 1 else noise * (2.0 / shape[-1]) ** 0.5
    for stack, parts in family.fused_parts(required=True).items():
        tensors[stack] = torch.stack([tensors.pop(part) for part in parts])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(small), encoding="utf-8")
    return str(folder)


def make_batch(vocab_size: int, seed: int) -> Batch:
    """Return a mini-batch of unequal responses with masked gaps, one with a single trained token and one with none."""
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(6, MAX_LENGTH, (NUM_RESPONSES,), generator=generator)
    prompts_B = torch.randint(2, 5, (NUM_RESPONSES,), generator=generator)
    total = int(lengths_B.sum())
    batch = Batch(lengths_B, {"input_ids_T": torch.randint(0, vocab_size, (total,), generator=generator)})
    position_T = torch.arange(total) - torch.repeat_interleave(batch.starts_B, lengths_B)
    prompts_T = torch.repeat_interleave(prompts_B, lengths_B)
    mask_T = position_T >= prompts_T
    mask_T &= ~((position_T > 15) & (position_T < 19))  # output of a tool
    response_T = batch.response_ids_T
    mask_T &= ~((response_T == 0) | ((response_T == 1) & (position_T != prompts_T)))
    return batch.add(
        {
            "loss_mask_T": mask_T,
            "advantages_B": torch.randn(NUM_RESPONSES, generator=generator, dtype=torch.float64),
            "noise_T": 0.3 * torch.randn(total, generator=generator, dtype=torch.float64),
        }
    )


def perturbed_logprobs(batch: Batch, scored: Columns) -> Columns:
    """Return old and rollout log-probs: those of the reference plus noise, so that ratios differ from 1."""
    old_T = scored["old_logprobs_T"] + batch["noise_T"]
    drift_T = 0.1 * torch.sin(50 * batch["noise_T"])  # per token, so that it does not depend on the layout
    return {**scored, "old_logprobs_T": old_T, "rollout_logprobs_T": old_T + drift_T}
