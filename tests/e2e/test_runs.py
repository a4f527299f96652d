"""Runs that go well: what a user finds afterwards, whoever started the ranks."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rl.cli import main
from megatron_rl.models.checkpoint_folders import open_checkpoint
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from tests.e2e.job import ONE_RANK, ROOT, Job, metrics_of
from tests.policy import families


def test_the_run_folder_holds_what_is_promised(straight):
    names = {path.name for path in straight.iterdir()}
    assert names >= {"config.json", "versions.json", "metrics.jsonl", "rollouts.jsonl", "console.log", "checkpoints"}
    assert [line["step"] for line in metrics_of(straight)] == [0, 1, 2, 3]
    assert [line["weight_version"] for line in metrics_of(straight)] == [0, 1, 2, 3]
    samples = [json.loads(line) for line in (straight / "rollouts.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 4 * 4
    recorded = [json.loads(line) for line in (straight / "tokens.jsonl").read_text().splitlines()]
    assert [line["step"] for line in recorded] == [0, 1, 2, 3]
    texts = {sample["id"]: sample["response"] for sample in samples}
    shown = [sample for line in recorded for sample in line["samples"]]
    assert len(shown) == 4 * 4
    assert all("".join(own["text"]).removesuffix("<eos>") == texts[own["id"]].removesuffix("<eos>") for own in shown)


def test_a_report_reads_all_that_a_run_wrote(tmp_path, straight):
    page = tmp_path / "report.html"
    assert main(["report", str(straight), "--output", str(page)]) == 0
    html = page.read_text()
    assert 'class="note"' not in html
    data = json.loads(re.findall(r'id="data">(.*?)</script>', html, re.DOTALL)[0])
    assert [step["step"] for step in data["runs"][0]["steps"]] == [0, 1, 2, 3]
    for plot in ("reward_mean", "clipped_by_length", "clipped_by_entropy", "mismatch_max", "phases"):
        assert f'data-plot="{plot}"' in html


def test_ratios_of_a_first_update_are_exactly_one(straight):
    assert [line["first_ratio_max"] for line in metrics_of(straight)] == [1.0] * 4
    assert max(line["ratio_max"] for line in metrics_of(straight)) > 1.0


def test_engine_and_trainer_agree_on_the_logprobs_they_both_give(straight):
    assert max(line["mismatch_max"] for line in metrics_of(straight)) < 1e-4


def test_torchrun_starts_the_ranks_just_as_well(tmp_path, straight):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "megatron_rl")
    with Job(tmp_path / "run", "train.steps=2", "log.tokens=0", command=torchrun) as job:
        assert job.end() == 0, job.output()
        assert job.metrics() == metrics_of(straight)[:2]  # nor does it matter whether tokens are kept
    assert not (tmp_path / "run" / "tokens.jsonl").exists()


def test_own_prompts_and_verifier_from_a_file(tmp_path):
    (tmp_path / "sums.jsonl").write_text(
        "".join(f'{{"q": "{a}+{b}=", "a": {a + b}}}\n' for a in range(5) for b in (1, 2))
    )
    (tmp_path / "mine.py").write_text(
        "def verify(prompt, response, answer):\n    return 0.25 if response.endswith(str(answer)) else 0.125\n"
    )
    settings = [
        "task.name=jsonl",
        f"task.path={tmp_path / 'sums.jsonl'}",
        "task.prompt_field=q",
        "task.answer_field=a",
        f"task.verifier={tmp_path / 'mine.py'}:verify",
        "train.tokens_per_microbatch=8192",
        "task.max_prompt_tokens=16",
        "train.steps=1",
    ]
    with Job(tmp_path / "run", *ONE_RANK, *settings) as job:
        assert job.end() == 0, job.output()
        assert 0.125 <= job.metrics()[0]["reward_mean"] <= 0.25


def test_the_engines_experts_are_taken_in_training(tmp_path, straight):
    settings = ["rollout.routing_replay=r3", "train.steps=2"]
    with Job(tmp_path / "run", *settings) as job:
        assert job.end() == 0, job.output()
        lines = job.metrics()
    assert [line["routing_missing_tokens"] for line in lines] == [0, 0]
    assert [line["first_ratio_max"] for line in lines] == [1.0, 1.0]
    # float32 on both sides: hardly a token is so near a tie that rounding decides.
    assert max(line["routing_differs_tokens"] for line in lines) < 1e-3
    assert max(line["mismatch_max"] for line in lines) < 1e-4
    assert lines[0]["reward_mean"] == metrics_of(straight)[0]["reward_mean"]


@pytest.mark.parametrize("carrier", ["disk", "distributed", "ipc", "stages"])
def test_every_carrier_brings_the_same_weights(tmp_path, straight, carrier):
    with Job(tmp_path / "run", f"weights.carrier={carrier}", "weights.bucket_bytes=196608", "train.steps=3") as job:
        assert job.end() == 0, job.output()
        assert job.metrics() == metrics_of(straight)[:3]
    if carrier == "disk":
        folder = tmp_path / "run" / "weights" / "version-3"
        writers = {path.name.split("-")[1] for path in folder.glob("model-*.safetensors")}
        assert writers == {"00000", "00001"}


def test_stages_that_send_at_the_same_time_bring_the_same_weights(tmp_path):
    stages = ["parallel.tensor=1", "parallel.expert=1", "parallel.pipeline=3", "rollout.servers=2", "train.steps=3"]
    metrics = []
    for carrier in ("tensor", "stages"):
        with Job(tmp_path / carrier, *stages, f"weights.carrier={carrier}", "weights.bucket_bytes=196608") as job:
            assert job.end() == 0, job.output()
            metrics.append(job.metrics())
    assert metrics[0] == metrics[1]


def test_exports_on_the_way_are_models_to_serve(tmp_path):
    settings = ["train.steps=2", "checkpoint.every=1", "checkpoint.export=true", "checkpoint.export_every=1"]
    with Job(tmp_path / "run", *settings) as job:
        assert job.end() == 0, job.output()
    assert "checkpoint" in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])["seconds"]
    exports = tmp_path / "run" / "exports"
    assert [path.name for path in sorted(exports.iterdir())] == ["step_00000001", "step_00000002"]
    weights = {}
    for step in (1, 2):
        folder = exports / f"step_{step:08}"
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        prompt = AutoTokenizer.from_pretrained(folder)("1+2=", return_tensors="pt")["input_ids"]
        assert model.generate(prompt, max_new_tokens=4).shape[1] > prompt.shape[1]
        family = family_of(read_hf_config(folder))
        source, saved = (open_checkpoint(f, family) for f in (folder, tmp_path / "run" / "checkpoints" / folder.name))
        weights[step] = {name: source.read(name) for name in family.hf_shapes()}
        assert all(torch.equal(saved.read(name), tensor) for name, tensor in weights[step].items())
    last = open_checkpoint(tmp_path / "run" / "export", family)
    assert all(torch.equal(last.read(name), tensor) for name, tensor in weights[2].items())
    assert not torch.equal(weights[1]["lm_head.weight"], weights[2]["lm_head.weight"])


@pytest.mark.slow
def test_gpt_oss_is_trained_and_every_push_reaches_its_server(tmp_path):
    """Its experts come in one tensor a layer, and each push must bring those of both ranks."""
    model = families.save("gpt_oss", tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "configs" / "demo-model" / name, model)
    (tmp_path / "sums.jsonl").write_text(
        "".join(f'{{"q": "{a}+{b}=", "a": {a + b}}}\n' for a in range(5) for b in (1, 2))
    )
    (tmp_path / "even.py").write_text(
        "def verify(prompt, response, answer):\n    return sum(c in '02468' for c in response) / 24\n"
    )
    settings = [
        f"model.path={model}",
        "task.name=jsonl",
        f"task.path={tmp_path / 'sums.jsonl'}",
        "task.prompt_field=q",
        "task.answer_field=a",
        f"task.verifier={tmp_path / 'even.py'}:verify",
        "task.max_prompt_tokens=16",
        "optimizer.lr=3e-3",
        "weights.bucket_bytes=65536",
        "train.steps=3",
        "checkpoint.export=true",
    ]
    with Job(tmp_path / "run", *settings) as job:
        assert job.end() == 0, job.output()
        lines = job.metrics()
    assert min(line["grad_norm"] for line in lines) > 0
    assert max(line["mismatch_max"] for line in lines) < 1e-4  # float32 on both sides, after each push too
    before, after = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (model, tmp_path / "run" / "export")
    )
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
