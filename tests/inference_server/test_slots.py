"""A decoding step looks at no value and mixes no devices: fit to be captured, for every family of models."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_rl.inference_server.experts import NAME, every_expert, experts_by, takes_every_expert
from megatron_rl.inference_server.kvcache import RowCache
from megatron_rl.inference_server.routes import RouteRecorder
from megatron_rl.inference_server.slots import Kind, SlotStep
from tests.policy import families

META = torch.device("meta")
"""In place of a GPU: a tensor of the CPU that gets between those of this device is an error, as on a GPU."""


def elsewhere(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model on the other device."""
    model_type, settings = families.MODELS[name]
    config = AutoConfig.for_model(model_type, **{**families.COMMON, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(parameter.to(META), requires_grad=False)
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(META)
    return model


def slots_like(states: Tensor, slots: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(slots, states.shape[1], width, states.shape[3], dtype=dtype, device=META)


def step_of(name: str, dtype: torch.dtype, kind: Kind) -> SlotStep:
    model = elsewhere(name, dtype)
    cache = RowCache(model.config.get_text_config().num_hidden_layers)
    wide = elsewhere(name, torch.bfloat16)  # which the grouped product takes, also without values
    wide(input_ids=torch.zeros(1, 3, dtype=torch.int64, device=META), past_key_values=cache, use_cache=True)
    shape = (kind.slots, kind.width)
    layers = [
        (slots_like(layer.keys, *shape, dtype), slots_like(layer.values, *shape, dtype)) for layer in cache.layers
    ]
    experts = NAME if dtype != torch.bfloat16 and takes_every_expert(model) else None
    return SlotStep(model, kind, layers, RouteRecorder(model), experts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", families.MODELS)
def test_a_step_of_every_family_looks_at_no_value(name: str, dtype: torch.dtype) -> None:
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        step = step_of(name, dtype, Kind(4, 64, 2, truncated=True, all_greedy=False, routed=True))
        addresses = {id(column) for column in vars(step.columns).values()}
        step.run()
        step.run()
        assert {id(column) for column in vars(step.columns).values()} == addresses


def test_such_a_look_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        step = step_of("qwen3", torch.float32, Kind(4, 64, 1, truncated=False, all_greedy=True, routed=False))
        step._places_W = torch.arange(64)  # on the CPU
        with pytest.raises(RuntimeError, match="device"):
            step.run()
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        mixture = step_of("qwen3_moe", torch.bfloat16, Kind(4, 64, 1, truncated=False, all_greedy=True, routed=False))
        mixture.experts = "eager"  # transformers' loop over the experts that were chosen
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            mixture.run()


@pytest.mark.parametrize("name", families.MIXTURES)
def test_every_expert_is_what_the_grouped_product_is(name: str) -> None:
    model = families.make(name, torch.float64)
    assert takes_every_expert(model)
    torch.manual_seed(0)
    for experts in (module for module in model.modules() if hasattr(module, "gate_up_proj")):
        hidden_TH = torch.randn(7, experts.down_proj.shape[2 if experts.is_transposed else 1], dtype=torch.float64)
        weights_TK, index_TK = torch.rand(7, experts.num_experts, dtype=torch.float64).topk(2)
        with experts_by(model, "eager"):
            expected = experts(hidden_TH, index_TK, weights_TK)
        torch.testing.assert_close(every_expert(experts, hidden_TH, index_TK, weights_TK), expected)
