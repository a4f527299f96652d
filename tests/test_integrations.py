"""Losses of parts of a mini-batch, segment ids of padded tensors, and the policy losses of verl.

verl is not a dependency: a stand-in has its registry and the fields of its actor's settings that are read.
``tests/peers/test_verl.py`` runs the real one.
"""

import importlib
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import megatron_rl
from megatron_rl.algorithms.objectives import OBJECTIVES
from megatron_rl.api import Option, Totals
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.errors import ConfigError
from megatron_rl.integrations.segments import entropy_segments, sentence_segments

ROWS, WIDTH, SIZE = 7, 9, 50
EXACT = {"rtol": 1e-12, "atol": 1e-14}
"""float64; only the order of a few dozen additions differs."""


def columns(seed: int = 0, *, step: float = 0.3) -> dict[str, Tensor]:
    """Return the inputs of ``policy_loss`` for rows of every length, one without a trained token."""
    random = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    old = -noise(ROWS, WIDTH).abs() - 0.05
    return {
        "logprobs": (old + step * noise(ROWS, WIDTH)).clamp(max=-1e-3),
        "old_logprobs": old,
        "advantages": noise(ROWS, 1).expand(ROWS, WIDTH),
        "loss_mask": torch.arange(WIDTH) < torch.tensor([3, 9, 0, 1, 5, 7, 2])[:, None],
        "entropies": noise(ROWS, WIDTH).abs(),
        "rollout_logprobs": (old + 0.1 * noise(ROWS, WIDTH)).clamp(max=-1e-3),
        "segment_ids": torch.arange(WIDTH).expand(ROWS, WIDTH) // 3,
    }


SUMS = {"bapo"}
"""Objectives whose columns need a sum over the mini-batch that is not a count."""
OPTIONS: Mapping[str, Option] = {"sspo": {"entropy_reference": 0.8}}


def options_of(name: str) -> dict[str, Option]:
    more = OPTIONS.get(name, {})
    return {"name": name, **(more if isinstance(more, Mapping) else {})}  # type: ignore[dict-item]


def loss_of(
    options: dict[str, Option], inputs: Mapping[str, Tensor], rows: list[int], totals: Totals | None
) -> tuple[Tensor, Tensor]:
    """Return (loss, gradient [B, S]) of some rows."""
    chosen = {name: column[rows] for name, column in inputs.items()}
    logprobs = chosen.pop("logprobs").clone().requires_grad_()
    if options["name"] != "sspo":
        del chosen["segment_ids"]
    result = megatron_rl.policy_loss(
        options,
        logprobs=logprobs,
        vocab_size=SIZE,
        totals=totals,
        factors=None,
        state=None,
        current_entropies=None,
        ref_logprobs=None,
        **chosen,
    )
    return result.loss.detach(), torch.autograd.grad(result.loss, logprobs)[0]


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - SUMS))
def test_losses_of_parts_add_up_to_that_of_the_mini_batch(name):
    inputs = columns()
    whole, gradient = loss_of(options_of(name), inputs, list(range(ROWS)), None)
    totals = Totals(responses=6, tokens=27)
    parts = [[0, 1], [2], [3, 4, 5], [6]]
    found = [loss_of(options_of(name), inputs, part, totals) for part in parts]
    torch.testing.assert_close(torch.stack([loss for loss, _ in found]).sum(), whole, **EXACT)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in found]), gradient, **EXACT)
    if name not in ("gmpo", "soft_sequence"):
        assert not torch.equal(loss_of(options_of(name), inputs, parts[0], None)[0], found[0][0])


@pytest.mark.parametrize("options", [{"name": "sspo"}, {"name": "bapo"}])
def test_options_that_need_other_sums_say_so(options):
    with pytest.raises(ConfigError, match="pass a function that adds a tensor over all parts"):
        loss_of(options, columns(), [0, 1], Totals(responses=6, tokens=27))


@pytest.mark.parametrize("name", ["sspo", "bapo"])
def test_a_function_that_adds_over_parts_gives_all_sums(name):
    """The sums of the whole mini-batch, recorded in one pass, stand in for a sum over ranks."""
    inputs = columns()
    recorded: list[Tensor] = []

    def record(values: Tensor) -> Tensor:
        recorded.append(values)
        return values

    whole, _ = loss_of({"name": name}, inputs, list(range(ROWS)), record)  # type: ignore[arg-type]
    losses = []
    for part in ([0, 1, 2], [3, 4, 5, 6]):
        sums = iter(recorded)
        losses.append(loss_of({"name": name}, inputs, part, lambda values, sums=sums: next(sums))[0])  # type: ignore[arg-type]
    torch.testing.assert_close(torch.stack(losses).sum(), whole, **EXACT)


def test_factors_multiply_the_costs():
    inputs = columns()
    common = {"loss_mask": inputs["loss_mask"], "old_logprobs": inputs["old_logprobs"]}
    generator = torch.Generator().manual_seed(3)
    factors = torch.rand(ROWS, WIDTH, generator=generator, dtype=torch.float64)

    def gradient(factors: Tensor | None) -> Tensor:
        logprobs = inputs["logprobs"].clone().requires_grad_()
        result = megatron_rl.policy_loss(
            "grpo", logprobs=logprobs, advantages=inputs["advantages"], factors=factors, **common
        )
        return torch.autograd.grad(result.loss, logprobs)[0]

    torch.testing.assert_close(gradient(factors), factors * gradient(None), **EXACT)


PIECES = [b"a", b" b", b".", b",", b"\n", b" c"]


def test_sentence_segments_end_at_delimiters_and_rows():
    vocabulary = Vocabulary(6, PIECES, frozenset())
    ids = torch.tensor([[0, 1, 2, 0, 3, 5], [2, 0, 2, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    sentences = sentence_segments(ids, mask, vocabulary, "sentence")
    assert sentences.tolist() == [[0, 0, 0, 1, 1, 1], [2, 3, 3, 4, -1, -1]]
    assert sentence_segments(ids, mask, vocabulary).tolist()[0] == [0, 0, 0, 1, 1, 2]


def test_segments_of_padded_tokens_are_those_of_the_trainer():
    """SSPO's own segments on whole sequences and the helper's give the same loss."""
    vocabulary = Vocabulary(6, PIECES, frozenset())
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 6, (ROWS, WIDTH), generator=random)
    inputs = columns()
    mask_T = inputs["loss_mask"].flatten()
    from megatron_rl.algorithms.objectives import SSPO
    from megatron_rl.data.types import Batch

    batch = Batch(
        torch.full((ROWS,), WIDTH),
        {
            "input_ids_T": ids.flatten(),
            "loss_mask_T": mask_T,
            "old_logprobs_T": inputs["old_logprobs"].flatten(),
            "old_entropies_T": inputs["entropies"].flatten(),
            "advantages_T": inputs["advantages"].flatten(),
        },
    )
    trainer = SSPO().prepare(batch, vocabulary)["segment_ids_T"][mask_T]
    helper = sentence_segments(ids, inputs["loss_mask"], vocabulary).flatten()[mask_T]
    assert torch.equal(torch.unique(trainer, return_inverse=True)[1], torch.unique(helper, return_inverse=True)[1])


def test_entropy_segments_are_the_most_uncertain_fifth():
    entropies = torch.tensor([[0.1, 0.9, 0.3, 0.9, 0.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert entropy_segments(entropies, mask).tolist() == [[0, 1, 0, 0, 0, -1], [0, 0, 0, 0, 1, 1]]


@dataclass
class StubActorConfig:
    """The fields of verl's ``ActorConfig`` that the losses read."""

    global_batch_info: dict[str, int | None] = field(default_factory=dict)
    loss_scale_factor: int | None = None
    policy_loss: dict[str, object] = field(default_factory=dict)


@pytest.fixture
def verl(monkeypatch) -> Iterator[types.ModuleType]:
    """The integration, with a registry like verl's in place of verl."""
    registry: dict[str, object] = {}

    def register_policy_loss(name: str):
        def decorator(function):
            registry[name] = function
            return function

        return decorator

    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    core = sys.modules["verl.trainer.ppo.core_algos"]
    core.register_policy_loss = register_policy_loss  # type: ignore[attr-defined]
    core.registry = registry  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "megatron_rl.integrations.verl", raising=False)
    yield importlib.import_module("megatron_rl.integrations.verl")
    sys.modules.pop("megatron_rl.integrations.verl", None)


def call(loss, rows: list[int], config: StubActorConfig | None = None, mode: str = "token-mean", **more: Tensor):
    chosen = {name: column[rows] for name, column in columns().items()}
    return loss(
        old_log_prob=chosen["old_logprobs"],
        log_prob=chosen["logprobs"],
        advantages=chosen["advantages"],
        response_mask=chosen["loss_mask"].double(),
        loss_agg_mode=mode,
        config=config,
        **more,
    )


def test_importing_registers_every_objective(verl):
    assert set(sys.modules["verl.trainer.ppo.core_algos"].registry) == {f"megatron_rl.{name}" for name in OBJECTIVES}


@pytest.mark.parametrize(
    ("mode", "aggregation"),
    [("token-mean", "token"), ("seq-mean-token-mean", "sequence"), ("seq-mean-token-sum", "sum")],
)
def test_micro_batches_of_data_parallel_ranks_average_to_the_loss(verl, mode, aggregation):
    """Two ranks with two micro-batches each; verl adds micro-batches and averages ranks."""
    loss = verl.register("mine", {"name": "grpo", "clip_high": 0.28})
    info: dict[str, int | None] = {"dp_size": 2, "batch_num_tokens": 27, "global_batch_size": 6}
    config = StubActorConfig(info)
    ranks = [([0, 1], [2]), ([3, 4, 5], [6])]
    averaged = sum(sum(call(loss, part, config, mode)[0] for part in parts) for parts in ranks) / 2
    options: dict[str, Option] = {"name": "grpo", "clip_high": 0.28, "aggregation": aggregation}
    whole, _ = loss_of(options, columns(), list(range(ROWS)), None)
    torch.testing.assert_close(averaged, whole, **EXACT)


def test_the_normalizer_is_verls_scale_factor(verl):
    loss = verl.register("mine", "grpo")
    rows = list(range(ROWS))
    for config, normalizer in ((StubActorConfig(loss_scale_factor=4), 4.0), (None, float(WIDTH))):
        found, _ = call(loss, rows, config, "seq-mean-token-sum-norm")
        options: dict[str, Option] = {"name": "grpo", "aggregation": "constant", "normalizer": normalizer}
        torch.testing.assert_close(found, loss_of(options, columns(), rows, None)[0], **EXACT)


def test_what_verl_does_not_pass_comes_from_worker_columns(verl):
    inputs, rows = columns(), list(range(ROWS))
    espo = verl.register("mine", "espo", vocab_size=SIZE)
    with pytest.raises(ConfigError, match="entropies"):
        call(espo, rows)
    with verl.worker_columns(entropies=inputs["entropies"]):
        found, metrics = call(espo, rows)
    torch.testing.assert_close(found, loss_of({"name": "espo"}, inputs, rows, None)[0], **EXACT)
    assert metrics["actor/tokens"] == 27
    with pytest.raises(ConfigError, match="entropies"):  # they do not outlive the block
        call(espo, rows)


def test_with_bypass_the_old_log_probs_are_those_of_the_engine(verl):
    dis, rows = verl.register("mine", "dis"), list(range(ROWS))
    with pytest.raises(ConfigError, match="rollout_logprobs"):
        call(dis, rows)
    bypass = StubActorConfig(policy_loss={"rollout_correction": types.SimpleNamespace(bypass_mode=True)})
    inputs = columns() | {"rollout_logprobs": columns()["old_logprobs"]}
    torch.testing.assert_close(call(dis, rows, bypass)[0], loss_of({"name": "dis"}, inputs, rows, None)[0], **EXACT)


def test_verls_weights_multiply_the_costs(verl):
    loss, rows = verl.register("mine", "reinforce"), list(range(ROWS))
    half = torch.full((ROWS, WIDTH), 0.5, dtype=torch.float64)
    torch.testing.assert_close(call(loss, rows, rollout_is_weights=half)[0], 0.5 * call(loss, rows)[0], **EXACT)


def test_settings_without_a_counterpart_are_errors(verl):
    loss = verl.register("mine", "grpo")
    with pytest.raises(ConfigError, match='"token-sum" has no counterpart'):
        call(loss, [0], mode="token-sum")
    with pytest.raises(ConfigError, match="several data-parallel ranks"):
        call(loss, [0], StubActorConfig({"dp_size": 2}))
