"""mbridge, another converter, fills our model from the same files with the same bytes: an independent cross-check.

Needs the package mbridge, which is frozen since 2025-09 and no dependency of ours: pip install --no-deps mbridge einops
"""

from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from megatron.core.utils import unwrap_model
from torch import Tensor
from transformers import AutoConfig

from megatron_rl.distributed.collectives import group_rank, group_size
from megatron_rl.distributed.mesh import start_world
from megatron_rl.models.hf_mapping.transformer_engine_names import torch_dist_key
from megatron_rl.policy.engine import Policy
from megatron_rl.policy.hf_weights import shards_of
from tests.policy import families
from tests.policy.families import MIXTURES
from tests.policy.tiny import run_of
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(find_spec("mbridge") is None, reason="mbridge is not installed")
KNOWN = ["llama", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v3", "moonlight"]


class EngineNames:
    """Our model under the names of transformer-engine's layers, the only ones that mbridge knows."""

    def __init__(self, policy: Policy) -> None:
        self.decoder = unwrap_model(policy.chunks)[0].decoder
        self.named: dict[str, Tensor] = {}
        local = policy.family.num_experts // group_size(policy.mesh.expert) or 1
        for shard in shards_of(policy.chunks, policy.family, policy.mesh):
            name = torch_dist_key(shard.name, shard.layer, policy.family)
            if shard.name.is_expert:
                number = shard.expert - local * group_rank(policy.mesh.expert)
                name = name.replace("experts.experts.", "experts.") + str(number)
            self.named[name] = shard.parameter.detach()

    def state_dict(self, *_args: object, **_kwargs: object) -> dict[str, Tensor]:
        return self.named


def filled_by_mbridge(folder: str, parallel: dict[str, object]) -> list[str]:
    """Return the parameters of this rank that mbridge fills differently from our table."""
    from mbridge import AutoBridge
    from mbridge.core.bridge import _MODEL_REGISTRY, Bridge

    policy = Policy(
        run_of(Path(folder), parallel=parallel),
        start_world(60, deterministic=True),
        total_updates=1,
    )
    view = EngineNames(policy)
    ours = {name: parameter.clone() for name, parameter in view.named.items()}
    for parameter in view.named.values():
        parameter.fill_(7)
    config = AutoConfig.from_pretrained(folder)
    # Attributes of transformers 4, which mbridge was written for.
    config.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    config.rope_theta = config.rope_parameters["rope_theta"]
    kind = _MODEL_REGISTRY[config.model_type]
    build, known = kind.TransformerConfigClass, {field.name for field in fields(kind.TransformerConfigClass)}
    # Some fields are gone from megatron-core 0.16.
    kind.TransformerConfigClass = staticmethod(lambda **given: build(**{k: given[k] for k in given if k in known}))
    kind._get_safetensor_io = Bridge._get_safetensor_io  # DeepSeek's own needs triton
    bridge = AutoBridge.from_config(config, dtype=torch.float32)
    bridge.load_weights([view], folder)
    return [name for name, parameter in view.named.items() if not torch.equal(parameter, ours[name])]


@pytest.mark.parametrize("layout", ["one rank", "two ranks"])
@pytest.mark.parametrize("name", KNOWN)
def test_mbridge_fills_the_model_with_the_same_bytes(tmp_path: Path, monkeypatch, name: str, layout: str) -> None:
    if name == "qwen3_moe":  # it does not know dense layers in this family
        kind, settings = families.MODELS[name]
        monkeypatch.setitem(families.MODELS, name, (kind, {**settings, "mlp_only_layers": []}))
    folder = families.save(name, tmp_path)
    parallel: dict[str, object] = {}
    if layout == "two ranks":
        parallel = {"tensor": 2, "expert": 2} if name in MIXTURES else {"tensor": 2}

    for different in run_ranks(filled_by_mbridge, 2 if parallel else 1, str(folder), parallel, initialize=False):
        assert different == []
