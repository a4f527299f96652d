"""NaN and inf are caught on the step that makes them, on every rank at once, and named."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megatron_rl.algorithms.loss import make_loss, prepare
from megatron_rl.cli import main
from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.distributed.mesh import start_world
from megatron_rl.policy.engine import Policy
from megatron_rl.policy.hf_weights import shards_of
from megatron_rl.policy.nonfinite import NonFiniteError
from megatron_rl.prove.case import NUM_RESPONSES, make_batch
from megatron_rl.train.nonfinite_dump import (
    DEBUG_RESULT,
    DEBUG_RUN,
    ROW,
    debug_rank,
    nonfinite_dump,
    on_saved_weights,
    saved_run,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.processes

MODEL = Path(__file__).parent.parent.parent / "configs" / "demo-model"
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, []),
    "tensor and expert": (2, ["parallel.tensor=2", "parallel.expert=2"]),
    "data and expert": (2, ["parallel.expert=2", "parallel.ranks=2"]),
    "context": (2, ["parallel.context=2"]),
    "pipeline": (3, ["parallel.pipeline=3"]),
}


def build(words):
    run = load(Run, [], [f"model.path={MODEL}", "train.tokens_per_microbatch=256", "objective.name=grpo", *words]).run
    return run, Policy(run, start_world(60.0, True), total_updates=4)


def mini_batch(policy):
    batch = make_batch(policy.family.vocab_size, seed=1)
    index_B = 100 + torch.arange(NUM_RESPONSES)
    zeros_T = torch.zeros(len(batch["loss_mask_T"]))
    return batch.add({"sample_index_B": index_B, "old_logprobs_T": zeros_T - 1.0})


def accumulate(policy, run, batch):
    part = policy.local_part(batch)
    prepared = part.add(prepare(part, run.objective, total=policy.total))
    return policy.forward_backward(prepared, make_loss(run.objective))


def caught(work):
    """Return the finding of what ``work`` raises, and how many responses the micro-batch has; None if nothing."""
    try:
        work()
    except NonFiniteError as error:
        return asdict(error.finding) | {"responses": len(error.batch), "message": str(error)}
    return None


def spoil_weight(policy, megatron, layer, expert=0):
    """Plant a NaN in a parameter of the ranks that hold it; return how to take it out again."""
    for shard in shards_of(policy.chunks, policy.family, policy.mesh):
        if (shard.name.megatron, shard.layer, shard.expert) == (megatron, layer, expert):
            kept = shard.parameter.detach().clone()
            shard.parameter.data.flatten()[7] = torch.nan
            return lambda: shard.parameter.data.copy_(kept)
    return lambda: None


def every_plant(words):
    """Return what is found for each mistake planted in turn, and at last for none."""
    run, policy = build(words)
    batch = mini_batch(policy)
    found = {"clean before": caught(lambda: accumulate(policy, run, batch))}

    undo = spoil_weight(policy, "decoder.layers.{layer}.self_attention.linear_proj.weight", 1)
    found["weight, score"] = caught(lambda: policy.compute_logprobs(policy.local_part(batch)))
    found["weight, loss"] = caught(lambda: accumulate(policy, run, batch))
    undo()
    undo = spoil_weight(policy, "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2.weight", 2, 5)
    found["expert"] = caught(lambda: accumulate(policy, run, batch))
    undo()

    advantages_B = batch["advantages_B"].clone()
    advantages_B[9] = torch.nan
    found["advantage"] = caught(lambda: accumulate(policy, run, batch.add({"advantages_B": advantages_B})))

    hooks = []
    for shard in shards_of(policy.chunks, policy.family, policy.mesh):
        if shard.name.megatron.endswith("linear_qkv.weight") and shard.layer == 1:
            hooks.append(shard.parameter.register_hook(lambda gradient: gradient * torch.inf))
    found["gradient"] = caught(lambda: accumulate(policy, run, batch))
    for hook in hooks:
        hook.remove()
    found["clean after"] = caught(lambda: accumulate(policy, run, batch))
    assert policy.updates == 0
    return found


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def found(request):
    by_rank = run_ranks(every_plant, LAYOUTS[request.param][0], LAYOUTS[request.param][1], timeout_seconds=120)
    assert all(other == by_rank[0] for other in by_rank), "ranks do not agree"
    return by_rank[0]


def test_a_finite_step_is_left_alone(found):
    assert found["clean before"] is None
    assert found["clean after"] is None


@pytest.mark.parametrize("stage", ["weight, score", "weight, loss"])
def test_a_spoilt_weight_is_found_in_its_layer_and_by_its_name(found, stage):
    finding = found[stage]
    assert (finding["kind"], finding["layer"]) == ("output", 1)
    assert finding["name"] == "of self_attention.linear_proj"
    assert finding["weights"] == ("model.layers.1.self_attn.o_proj.weight",)
    assert 100 <= finding["sample"] < 100 + NUM_RESPONSES
    assert 0 < finding["responses"] < NUM_RESPONSES
    assert "layer 1, rank" in finding["message"]


def test_a_spoilt_expert_is_found_on_whichever_rank_holds_it(found):
    finding = found["expert"]
    assert (finding["kind"], finding["layer"]) == ("output", 2)
    assert "mlp.experts" in finding["name"]
    assert finding["weights"] == ("model.layers.2.mlp.experts.5.down_proj.weight",)


def test_a_spoilt_advantage_is_named_with_its_sample(found):
    finding = found["advantage"]
    assert (finding["kind"], finding["name"], finding["sample"]) == ("loss column", "advantages_T", 109)
    assert finding["weights"] == ()


def test_a_spoilt_gradient_is_found_before_the_optimizer_sees_it(found):
    finding = found["gradient"]
    assert (finding["kind"], finding["layer"]) == ("gradient", 1)
    assert "model.layers.1.self_attn.q_proj.weight" in finding["name"]
    assert finding["sample"] >= 100


def fail_in(folder, words, plants_weight):
    """Fail as a run fails; return the message of each rank."""
    run, policy = build([*words, f"log.path={folder}"])
    batch = mini_batch(policy)
    if plants_weight:
        spoil_weight(policy, "decoder.layers.{layer}.self_attention.linear_qkv.weight", 2)
    else:
        batch = batch.add({"advantages_B": batch["advantages_B"].index_fill(0, torch.tensor([4]), torch.inf)})
    try:
        with nonfinite_dump(run, policy, "id-{}".format):
            accumulate(policy, run, batch)
    except Exception as error:
        return str(error)
    raise AssertionError("nothing was caught")


def saved(layout, folder, plants_weight):
    """Let a run fail; return its message and the file it leaves."""
    ranks, words = LAYOUTS[layout]
    messages = run_ranks(fail_in, ranks, folder, words, plants_weight, timeout_seconds=120)
    file = folder / "nonfinite" / ROW
    assert f"megatron-rl debug-nonfinite {file}" in messages[0]
    assert all("main rank" in message for message in messages[1:])
    return messages[0], file


def test_the_saved_micro_batch_shows_the_same_again_on_one_rank(tmp_path, capsys):
    message, file = saved("data and expert", tmp_path, plants_weight=False)
    assert "sample 104 is id-104" in message
    assert main(["debug-nonfinite", str(file)]) == 1
    then, *now = capsys.readouterr().out.splitlines()
    assert now[0] == "now:  score: finite"
    assert now[1].startswith("now:  loss and backward: NaN or inf in the loss column advantages_T")
    assert then.endswith(now[1].split(": ", 2)[2])


def test_the_saved_micro_batch_shows_the_same_again_on_the_ranks_of_the_run(tmp_path):
    message, file = saved("tensor and expert", tmp_path, plants_weight=True)
    run, ranks, _ = saved_run(file)
    (tmp_path / DEBUG_RUN).write_text(on_saved_weights(run, file).model_dump_json())
    run_ranks(debug_rank, ranks, file, tmp_path, initialize=False, timeout_seconds=120)
    (stage,) = json.loads((tmp_path / DEBUG_RESULT).read_text())
    assert stage["stage"] == "score"
    assert "layer 2" in stage["found"]
    assert stage["found"] in message
