"""The gap between rollout and trainer log-probs: how far, and from what cause."""

import json

import numpy as np
import pytest
import torch

from megatron_rl.config.load import load
from megatron_rl.config.rollout import Sampling
from megatron_rl.config.schema import Run
from megatron_rl.data.step import StepSamples
from megatron_rl.data.types import Group, Prompt, Response
from megatron_rl.distributed.replicas import Replicas
from megatron_rl.errors import TrainingError
from megatron_rl.observability.mismatch_causes import (
    Diagnosis,
    EngineQuantization,
    LogprobGaps,
    MismatchSettings,
    RoutingDifferences,
    diagnose,
)
from megatron_rl.observability.mismatch_report import MismatchReport
from megatron_rl.rollout.collect import collect
from megatron_rl.rollout.records import recorded_sample
from megatron_rl.tasks.base import Verdict
from tests.minibatches import alone

EXACT = MismatchSettings("float32", "float32", Sampling())


class Letters:
    """A tokenizer of one letter a token, and one token that spells two: text does not give it back."""

    def encode(self, text, *, add_special_tokens):
        return [ord(letter) - 97 for letter in text]

    def decode(self, token_ids, skip_special_tokens=False):
        return "".join("ab" if token == 26 else chr(97 + token) for token in token_ids)

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt, **variables):
        raise NotImplementedError


def response(index, ids, versions=None):
    versions = versions or ((3, 0, len(ids)),)
    text = Letters().decode(ids)
    return Response(f"r{index}", "p", index, np.array(tuple(ids)), np.array((-1.0,) * len(ids)), text, "stop", versions)


def scored(groups, gaps=(), settings=()):
    """Return the batch of the groups, the trainer's log-probs apart from the engine's by ``gaps`` {token: gap}."""
    run = load(Run, [], ["model.path=x", *settings]).run
    verdicts = [[Verdict(float(r.index % 2), False) for r in g.responses] for g in groups]
    batch = collect(groups, verdicts, run)
    old_T = batch["rollout_logprobs_T"].clone()
    for token, apart in dict(gaps).items():
        old_T[token] += apart
    return batch.add({"old_logprobs_T": old_T})


def gaps_of(batches) -> LogprobGaps:
    return LogprobGaps.of([alone(batch) for batch in batches], Replicas())


def samples_of(groups) -> StepSamples:
    samples = [(group.prompt, response) for group in groups for response in group.responses]
    counts = [len(response.output_ids) for _, response in samples]
    return StepSamples(counts, lambda indices: [recorded_sample(*samples[index]) for index in indices])


def compared(report, groups, *batches):
    return report.compare(3, samples_of(groups), [alone(batch) for batch in batches], gaps_of(batches), None)


def diagnosed(batch, version, settings, routing=None) -> Diagnosis:
    found = diagnose(gaps_of([batch]), version, settings, routing)
    assert found is not None
    return found


@pytest.fixture
def groups():
    prompt = Prompt("p", (0, 1), "ab", "")
    return [Group(prompt, (response(0, [2, 3, 4]), response(1, [5, 6, 26, 7])))]


def test_the_batch_knows_which_sample_and_which_weights_each_token_is_from(groups):
    mixed = response(1, [5, 6, 7, 8], ((2, 0, 1), (3, 1, 3)))
    batch = scored([Group(groups[0].prompt, (groups[0].responses[0], mixed))])
    assert batch["sample_index_B"].tolist() == [0, 1]
    assert batch["weight_versions_T"].tolist() == [-1, -1, 3, 3, 3, -1, -1, 2, 3, 3, -1]


def test_a_small_gap_is_rounding_of_the_coarser_type(groups):
    batch = scored(groups, {3: 0.05})
    assert diagnosed(scored(groups, {3: 1e-5}), 3, EXACT).cause == "numerics"
    assert diagnosed(batch, 3, EXACT).cause == "unexplained"
    assert diagnosed(batch, 3, MismatchSettings("bfloat16", "float32", Sampling())).cause == "numerics"
    assert "mean 7.1e-03" in diagnosed(batch, 3, EXACT).verdict


def test_stale_weights_are_the_cause_only_if_the_other_tokens_agree(groups):
    stale = Group(groups[0].prompt, (groups[0].responses[0], response(1, [5, 6, 7, 8], ((2, 0, 4),))))
    found = diagnosed(scored([stale], {8: 0.5}), 3, EXACT)
    assert found.cause == "stale weights"
    assert "'versions': {'2': 4}" in str(found.causes["stale_weights"])
    assert found.verdict.endswith("sampled some tokens (4 of version 2; scored by 3), the others agree")
    assert diagnosed(scored([stale], {8: 0.5, 3: 0.5}), 3, EXACT).cause == "unexplained"
    everything = Group(groups[0].prompt, (response(0, [5], ((1, 0, 1),)),))
    found = diagnosed(scored([everything], {2: 0.5}), 3, EXACT)
    assert found.cause == "stale weights"
    assert found.verdict.endswith("older weights sampled every token (1 of version 1; scored by 3)")


def test_settings_that_the_trainer_does_not_model_are_named(groups):
    cut = MismatchSettings("float32", "float32", Sampling(top_p=0.9, top_k=5))
    found = diagnosed(scored(groups, {3: -0.5}), 3, cut)
    assert found.cause == "sampling"
    assert "top_p = 0.9, top_k = 5" in found.verdict
    assert found.causes["sampling"] == {"settings": ["top_p = 0.9", "top_k = 5"], "engine_higher": pytest.approx(1 / 7)}
    assert diagnosed(scored(groups), 3, cut).cause == "numerics"


def test_a_gap_within_the_error_of_quantized_weights_is_explained(groups):
    fp8 = MismatchSettings("float32", "float32", Sampling(), EngineQuantization("FP8", 0.026))
    found = diagnosed(scored(groups, {3: 0.5}), 3, fp8)  # a mean of 0.07 nats, of 0.26
    assert found.cause == "quantization"
    assert found.verdict.endswith("the engine's weights are FP8; their error of 2.6% explains a mean of up to 0.3 nats")
    assert found.causes["quantization"] == {
        "label": "FP8",
        "relative_error": 0.026,
        "mean_bound": pytest.approx(0.26),
        "p99_bound": pytest.approx(2.6),
    }
    assert diagnosed(scored(groups, {3: 3.0}), 3, fp8).cause == "unexplained"
    assert diagnosed(scored(groups, {3: 1e-5}), 3, fp8).cause == "numerics"
    assert diagnosed(scored(groups), 3, EXACT).causes["quantization"] is None


def test_routing_is_told_only_where_the_engine_returns_it(groups):
    batch = scored(groups, {3: 0.5})
    assert diagnosed(batch, 3, EXACT).causes["routing"] is None
    assert diagnosed(batch, 3, EXACT, RoutingDifferences(tokens=0.1, layers=0.02)).cause == "routing"
    assert diagnosed(batch, 3, EXACT, RoutingDifferences(tokens=0.0, layers=0.0)).cause == "unexplained"


def test_log_probs_that_are_no_numbers_come_first(groups):
    batch = scored(groups)
    batch = batch.add({"rollout_logprobs_T": batch["rollout_logprobs_T"].index_fill(0, torch.tensor([4]), torch.nan)})
    assert diagnosed(batch, 3, EXACT).cause == "not finite"


def test_nothing_trained_says_nothing(groups):
    batch = scored(groups)
    nothing = batch.add({"loss_mask_T": torch.zeros_like(batch["loss_mask_T"])})
    assert diagnose(gaps_of([nothing]), 3, EXACT) is None


def test_the_engines_type_is_the_models_unless_its_options_say_otherwise():
    words = ["model.path=x", "model.dtype=bfloat16"]
    assert MismatchSettings.of(load(Run, [], words).run).engine_dtype == "bfloat16"
    assert (
        MismatchSettings.of(load(Run, [], [*words, 'rollout.sglang={dtype="float32"}']).run).engine_dtype == "float32"
    )


def test_the_file_lists_the_worst_tokens_with_name_text_and_place(groups, tmp_path):
    report = MismatchReport(load(Run, [], ["model.path=x", f"log.path={tmp_path}"]).run, Letters())
    # two mini-batches, shuffled, as the loop has them; token 9 is the third output token of r1, "ab"
    parts = scored(groups, {9: 0.5, 3: 0.25}).split(2, seed=(0, 3))
    verdict = compared(report, groups, *parts)
    assert verdict is not None
    assert "UNEXPLAINED" in verdict
    record = json.loads((tmp_path / "mismatch.json").read_text())
    first, second = record["worst_tokens"][:2]
    assert (first["sample"], first["position"], first["text"], first["before"]) == ("r1", 2, "ab", "fg")
    assert (first["rollout_logprob"], first["trainer_logprob"], first["weight_version"]) == (-1.0, -0.5, 3)
    assert (second["sample"], second["position"], second["text"]) == ("r0", 1, "d")
    assert [sample["sample"] for sample in record["worst_samples"]] == ["r1", "r0"]
    assert record["worst_samples"][0]["mean"] == pytest.approx(0.125)
    assert record["causes"]["tokenisation"] == {"responses": 2, "other_ids": 1, "samples": ["r1"]}


def test_the_verdict_is_told_again_only_when_the_cause_changes(groups, tmp_path):
    words = ["model.path=x", f"log.path={tmp_path}", "train.mismatch_limit=0"]
    report = MismatchReport(load(Run, [], words).run, Letters())
    told = [
        compared(report, groups, scored(groups, gaps)) for gaps in ({3: 0.0}, {3: 1e-6}, {3: 0.5}, {3: 0.6}, {3: 0.0})
    ]
    assert [line is not None for line in told] == [True, False, True, False, True]
    assert json.loads((tmp_path / "mismatch.json").read_text())["cause"] == "numerics"


def test_an_unexplained_gap_far_above_rounding_ends_the_run_after_its_first_step(groups, tmp_path):
    def compare_twice(gap: float, *words: str) -> None:
        report = MismatchReport(load(Run, [], ["model.path=x", f"log.path={tmp_path}", *words]).run, Letters())
        compared(report, groups, scored(groups, {3: gap}))  # the first step only warns
        compared(report, groups, scored(groups, {3: gap}))

    count = int(scored(groups)["loss_mask_T"].sum())
    above, below = 11e-4 * count, 9e-4 * count  # means of 11 and 9 times the rounding of float32
    with pytest.raises(TrainingError, match=r"^step 3: .*UNEXPLAINED.*above 1e-03, 10 times .*train\.mismatch_limit"):
        compare_twice(above)
    assert json.loads((tmp_path / "mismatch.json").read_text())["worst_tokens"][0]["position"] == 1
    compare_twice(below)
    compare_twice(above, "train.mismatch_limit=20")
    compare_twice(above, "train.mismatch_limit=0")
    with pytest.raises(TrainingError, match="5 times"):
        compare_twice(below, "train.mismatch_limit=5")


def test_a_gap_without_end_is_null_in_the_file(groups, tmp_path):
    report = MismatchReport(load(Run, [], ["model.path=x", f"log.path={tmp_path}"]).run, Letters())
    compared(report, groups, scored(groups, {3: -torch.inf}))
    assert json.loads((tmp_path / "mismatch.json").read_text())["gap"]["abs_max"] is None
