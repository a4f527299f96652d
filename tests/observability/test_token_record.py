"""What is kept of a step's tokens: the same under any layout, whole, and true to the loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from megatron_rl.algorithms.loss import make_loss, prepare, summary
from megatron_rl.algorithms.objectives import AnyObjective
from megatron_rl.algorithms.objectives.base import Objective
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.step import RecordedSample, StepSamples
from megatron_rl.data.types import Batch
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.distributed.mesh import start_world
from megatron_rl.observability.token_record import TokenRecord, chosen, token_texts
from megatron_rl.policy.engine import Policy
from megatron_rl.prove.case import make_batch, perturbed_logprobs
from tests.minibatches import alone
from tests.policy.tiny import VOCABULARY, run_of, save_model
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = Vocabulary(VOCABULARY, tuple(b"." if token % 4 == 0 else b"a" for token in range(VOCABULARY)))


class Letters:
    """One letter a token."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("a") + token) for token in token_ids)


class Bytes:
    """One byte a token, and like SentencePiece none of a leading space."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(token_ids).decode("utf-8", "replace").removeprefix(" ")


def objective_of(name: str) -> Objective:
    return TypeAdapter(AnyObjective).validate_python({"name": name})


def rewarded(batch: Batch) -> Batch:
    """Return the batch with what ``collect`` says of each response."""
    count = len(batch)
    verified_B = torch.ones(count, dtype=torch.bool)
    return batch.add(
        {"sample_index_B": torch.arange(count), "rewards_B": batch["advantages_B"], "verified_B": verified_B}
    )


def samples_of(batch: Batch) -> StepSamples:
    samples = [RecordedSample(f"r{i}", "p", "question", "", ()) for i in range(len(batch))]
    return StepSamples([0] * len(batch), lambda indices: [samples[index] for index in indices])


def trained(name: str) -> tuple[Batch, dict[str, float]]:
    """Return a mini-batch after an update in one process, with random log-probs, and its metrics."""
    batch = rewarded(make_batch(VOCABULARY, seed=3))
    generator = torch.Generator().manual_seed(2)
    total = int(batch.lengths_B.sum())
    scores = -3 * torch.rand(2, total, generator=generator, dtype=torch.float64)
    batch = batch.add({"old_logprobs_T": scores[0], "rollout_logprobs_T": scores[0], "old_entropies_T": -scores[1]})
    objective = objective_of(name)
    prepared = batch.add(prepare(batch, objective, vocabulary=WORDS))
    inputs = LossInputs.gather(prepared)
    new_R = (scores[0] + 0.3 * torch.randn(total, generator=generator))[prepared.trained_R]
    loss = make_loss(objective, keep_tokens=True)(new_R, torch.ones_like(new_R), inputs)
    columns = {}
    for column, values_R in loss.metrics.tokens.items():
        columns[column] = torch.zeros(total, dtype=torch.float64)
        columns[column][prepared.trained_R] = values_R
    return prepared.add(columns), summary(loss.metrics)


def taken(record: TokenRecord, step: int, batch: Batch) -> dict[str, Any]:
    line = record.take(step, samples_of(batch))
    assert line is not None
    return line


OBJECTIVES = ("grpo", "gspo", "sapo", "sspo", "espo", "cispo", "gmpo", "dppo")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bins_add_up_to_what_the_metrics_say(name):
    batch, metrics = trained(name)
    record = TokenRecord(4, Letters())
    record.add(alone(batch))
    record.add(alone(batch))
    line = taken(record, 7, batch)

    assert (line["step"], line["updates"], record.updates) == (7, 2, 0)
    for bins in (line["by_length"], line["by_entropy"]):
        assert len(bins["segments"]) == len(bins["edges"]) + 1
        assert sum(bins["segments"]) == 2 * metrics["segments"]
        assert sum(bins["tokens"]) == 2 * metrics["tokens"]
        # Written with six digits.
        assert sum(bins["clipped_tokens"]) / sum(bins["tokens"]) == pytest.approx(metrics["clipped_fraction"], rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_sample_has_the_numbers_of_its_tokens_and_of_its_whole_segments(name):
    batch, _ = trained(name)
    record = TokenRecord(4, Letters())
    record.add(alone(batch))
    line = taken(record, 0, batch)

    assert len(line["samples"]) == 4
    for sample in line["samples"]:
        owner = int(sample["id"][1:])
        start, end = int(batch.starts_B[owner]), int(batch.starts_B[owner] + batch.lengths_B[owner])
        mask = batch["loss_mask_T"][start:end]
        first = int(mask.nonzero()[0])
        place = slice(start + first, end)
        assert "".join(sample["text"]) == Letters().decode(batch["input_ids_T"][place].tolist())
        assert [segment >= 0 for segment in sample["segment"]] == mask[first:].tolist()
        for key, column in (("old", "old_logprobs_T"), ("new", "new_logprobs_T"), ("entropy", "old_entropies_T")):
            assert [value is None for value in sample[key]] == (~mask[first:]).tolist()
            expected = batch[column][place][mask[first:]].tolist()
            assert [value for value in sample[key] if value is not None] == pytest.approx(expected, rel=1e-5)
        for number in range(len(sample["segments"]["tokens"])):
            places = [start + first + i for i, segment in enumerate(sample["segment"]) if segment == number]
            assert sample["segments"]["tokens"][number] == len(places)
            log_ratio = float(batch["log_ratios_T"][places].mean())
            assert sample["segments"]["ratio"][number] == pytest.approx(torch.tensor(log_ratio).exp().item(), rel=1e-5)


def test_which_tokens_are_clipped_is_told_where_segments_do_not_tell_it():
    batch, _ = trained("gmpo")
    record = TokenRecord(8, Letters())
    record.add(alone(batch))
    told = [sample for sample in taken(record, 0, batch)["samples"] if "clipped_tokens" in sample]
    assert told
    for sample in told:
        (share,), (count,) = sample["segments"]["clipped"], sample["segments"]["tokens"]
        assert len(sample["clipped_tokens"]) == round(share * count)


def test_ratios_of_clipped_segments_lie_outside_their_window_on_the_side_of_the_advantage():
    clipped = 0
    for name in ("grpo", "gspo", "sspo", "espo"):
        batch, _ = trained(name)
        record = TokenRecord(8, Letters())
        record.add(alone(batch))
        for sample in taken(record, 0, batch)["samples"]:
            s, rises = sample["segments"], sample["advantage"] > 0
            for ratio, low, high, share in zip(s["ratio"], s["low"], s["high"], s["clipped"], strict=True):
                assert share == (ratio > 1 + high if rises else ratio < 1 - low)
                clipped += share
    assert clipped > 20


def test_long_responses_are_cut_and_their_segments_are_not(monkeypatch):
    batch, _ = trained("gspo")
    monkeypatch.setattr("megatron_rl.observability.token_record.TOKENS_PER_STEP", 12)
    record = TokenRecord(4, Letters())
    record.add(alone(batch))
    samples = taken(record, 0, batch)["samples"]
    assert max(len(sample["text"]) for sample in samples) == 3
    assert all(sample["all_segments"] == 1 for sample in samples)
    assert all(len(sample[key]) == len(sample["text"]) for sample in samples for key in ("old", "new", "segment"))
    counts = {f"r{i}": float(count) for i, count in enumerate(batch.trainable_counts_B)}
    assert [sample["segments"]["tokens"] for sample in samples] == [[counts[sample["id"]]] for sample in samples]


def test_a_step_whose_last_mini_batch_trains_nothing_is_recorded_too():
    batch, _ = trained("sspo")
    record = TokenRecord(4, Letters())
    record.add(alone(batch))
    record.add(alone(batch.select([0])))  # the response without a trained token
    record.add(alone(batch.select([])))
    line = taken(record, 0, batch)
    assert (line["updates"], line["samples"]) == (3, [])
    assert sum(line["by_length"]["tokens"]) == len(batch.trained_R)


@pytest.mark.parametrize(
    ("advantages", "picked"),
    [([1, 1, 1, -1, -1, -1], [0, 1, 3, 4]), ([1, 1, 1, 1, 1, -1], [0, 1, 2, 5]), ([0, 1, 0, 0, 0, 0], [1, 0, 2, 3])],
)
def test_both_signs_are_shown_where_there_are_both(advantages, picked):
    masks = torch.ones(6, dtype=torch.bool)
    columns = {"loss_mask_T": masks, "input_ids_T": torch.arange(6), "advantages_B": torch.tensor(advantages).double()}
    assert chosen(Batch(torch.ones(6, dtype=torch.int64), columns), 4) == picked


@pytest.mark.parametrize("text", ["a caf\u00e9 \u20ac 5", "\u6c34\n", " x", "\U0001f600"])
def test_texts_of_tokens_join_to_the_text_of_all(text):
    ids = list(text.encode())
    texts = token_texts(ids, Bytes())
    assert len(texts) == len(ids)
    assert "".join(texts) == Bytes().decode(ids)


def test_bytes_that_are_no_character_keep_their_places():
    assert token_texts([0xFF, 97, 0xE2, 0x82], Bytes()) == ["", "\ufffda", "", "\ufffd"]


LAYOUTS: dict[str, dict[str, object]] = {
    "one rank": {},
    "data": {},
    "context": {"context": 2},
    "pipeline": {"pipeline": 2},
    "tensor": {"tensor": 2},
}


def one_line(folder: str, parallel: dict[str, object], name: str) -> dict[str, object] | None:
    """Score, train and record on this rank, against an old policy moved by noise."""
    run = run_of(Path(folder), parallel=parallel)
    world = start_world(60, deterministic=True)
    policy = Policy(run, world, total_updates=1)
    batch = rewarded(make_batch(VOCABULARY, seed=3))
    part = policy.local_part(batch)
    part = part.add(perturbed_logprobs(part, policy.compute_logprobs(part).as_old()))
    objective = objective_of(name)
    prepared = part.add(prepare(part, objective, vocabulary=WORDS, total=policy.total))
    summed = policy.forward_backward(prepared, make_loss(objective, keep_tokens=True))
    record = TokenRecord(8, Letters(), replicas=policy.mesh.replicas)
    record.add(prepared.add(summed.tokens))
    return record.take(0, samples_of(batch) if world.is_main else StepSamples())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def same(ours: object, expected: object, at: str = "") -> None:
    """Assert that two lines say the same, numbers but for rounding."""
    assert type(ours) is type(expected), at
    if isinstance(ours, dict) and isinstance(expected, dict):
        assert ours.keys() == expected.keys(), at
        for key in ours:
            same(ours[key], expected[key], f"{at}/{key}")
    elif isinstance(ours, list) and isinstance(expected, list):
        assert len(ours) == len(expected), at
        for place, (a, b) in enumerate(zip(ours, expected, strict=True)):
            same(a, b, f"{at}/{place}")
    elif isinstance(ours, float):
        # float32 log-probs of a few nats differ by 1e-6 between layouts; the noise keeps ratios off their borders.
        assert ours == pytest.approx(expected, abs=2e-5, rel=2e-5), at
    else:
        assert ours == expected, at


@pytest.mark.processes
@pytest.mark.parametrize("name", ["espo", "sspo"])
def test_the_same_is_written_under_any_layout(model, name):
    lines = {}
    for layout, parallel in LAYOUTS.items():
        ranks = 1 if layout == "one rank" else 2
        lines[layout] = run_ranks(one_line, ranks, str(model), parallel, name, initialize=False, timeout_seconds=280)
        assert lines[layout][1:] == [None] * (ranks - 1)
    for layout in LAYOUTS:
        same(lines[layout][0], lines["one rank"][0], layout)
