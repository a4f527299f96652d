"""The plan of a run and ``megatron-rl check``: problems, notes and warnings of a configuration."""

import json
from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.config.load import load, split_words
from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError
from megatron_rl.launch.planning.megatron_fields import OPTIMIZER, TRANSFORMER, megatron_fields
from megatron_rl.launch.planning.run_plan import make_plan
from tests.policy import families

CONFIGS = Path(__file__).parents[3] / "configs"
DEMO = CONFIGS / "demo.toml"


def plan(*settings: str, ranks: int | None = None):
    return make_plan(load(Run, [DEMO], settings), ranks, on_gloo=True)


def problems(*settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(*settings)
    return str(caught.value)


def test_the_demo_is_valid():
    made = plan()
    assert made.layout.ranks == 2
    assert (made.batches.responses, made.batches.per_update, made.batches.longest) == (256, 64, 52)
    assert made.batches.max_rows == 1
    assert made.notes == ()


def test_rows_are_counted_at_the_maximum_length_and_rounded_to_the_data_parallel_size():
    assert plan("train.tokens_per_microbatch=520").batches.max_rows == 7
    assert plan("train.tokens_per_microbatch=520", ranks=4).batches.max_rows == 8
    assert plan("train.packing=false").batches.max_rows == 64
    assert plan("parallel.context=2", "rollout.sampling.max_new_tokens=41").batches.longest == 56


@pytest.mark.processes
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("train.updates_per_step=5",), ["does not divide the 256 responses", "write 4 or 8"]),
        (("train.updates_per_step=300",), ["write 256"]),
        (("train.tokens_per_microbatch=51",), ["less than the longest sequence, 52 tokens", "write at least 52"]),
        (("rollout.sampling.max_new_tokens=245",), ["maximum is 256", "write at most 244"]),
        (("rollout.servers=0",), ["nothing would sample"]),
        (("rollout.engine=vllm",), ["write their addresses in rollout.urls"]),
        (("rollout.engine=sglang",), ["write its interpreter in rollout.sglang_python", "rollout.urls"]),
        (("rollout.sglang_python=/nowhere/python", "rollout.engine=sglang"), ["could not run /nowhere/python -m"]),
        (("model.path=nowhere",), ["no config.json in", "nowhere"]),
        (("model.megatron.moe_aux_los_coeff=1e-3",), ["did you mean moe_aux_loss_coeff?"]),
        (("model.megatron.tensor_model_parallel_size=2",), ["is decided by parallel.tensor"]),
        (("model.megatron.hidden_dropout=0.1",), ["cannot be set"]),
    ],
)
def test_problems_have_a_remedy(settings, words):
    output = problems(*settings)
    for word in words:
        assert word in output
    assert f"command line: {settings[0]}" in output or "no config.json" in output


def test_invalid_prompt_files_are_found_before_anything_starts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "answer": "y"}\n{\n')
    (tmp_path / "b.jsonl").write_text("\n")
    output = problems(
        "task.name=jsonl",
        f"task.path={tmp_path / 'a.jsonl'}",
        f"task.heldout_path={tmp_path / 'b.jsonl'}",
        "task.verifier=exat",
        "task.max_prompt_tokens=100",
    )
    assert output.startswith("3 problems:")
    for words in ("a.jsonl:2", "no row in", "did you mean exact?"):
        assert words in output


def test_problems_of_layout_batches_and_names_are_reported_together():
    output = problems("parallel.tensor=3", "train.updates_per_step=5", "model.megatron.foo=1")
    assert output.startswith("4 problems:")


def test_running_servers_replace_started_ones():
    assert plan("rollout.engine=sglang", 'rollout.urls=["http://h:1"]', "rollout.servers=0")


def test_unusual_settings_are_noted():
    notes = "\n".join(plan("train.updates_per_step=1", "rollout.sampling.top_p=0.9").notes)
    assert "all ratios are 1" in notes
    assert "top_p" in notes


UNBOUNDED = "does not bound a ratio from above"


@pytest.mark.parametrize(
    ("words", "found", "not_found"),
    [
        (["objective.name=grpo"], ['correction.kind = "tis" or objective.dual_clip = 3', UNBOUNDED], []),
        (["objective.name=espo"], ["objective.dual_clip = 3", UNBOUNDED], []),
        (["objective.name=gmpo"], ['correction.kind = "tis"', UNBOUNDED], ["dual_clip"]),
        (["objective.name=grpo", "objective.dual_clip=3"], ['correction.kind = "tis"'], [UNBOUNDED]),
        (["objective.name=sapo"], ['correction.kind = "tis"'], ["dual_clip", UNBOUNDED]),
        (["objective.name=grpo", "train.updates_per_step=1"], ['correction.kind = "tis"'], [UNBOUNDED]),
    ],
)
def test_lag_without_correction_is_a_warning_with_a_remedy(words, found, not_found):
    (output,) = plan("rollout.max_lag=2", *words).warnings
    assert output.startswith("rollout.max_lag = 2 (command line: rollout.max_lag=2)")
    assert all(part in output for part in found)
    assert not any(part in output for part in not_found)
    assert plan("rollout.max_lag=2", "correction.kind=tis", *words).warnings == ()
    assert plan(*words).warnings == ()


@pytest.mark.parametrize("objective", ["objective.name=dis", "objective.name=cispo objective.anchor=rollout"])
def test_a_weight_on_top_of_a_ratio_to_the_rollout_policy_is_a_warning(objective):
    words = objective.split()
    for kind in ("tis", "mis", "icepop"):
        (output,) = plan(*words, f"correction.kind={kind}").warnings
        assert "corrected twice" in output
        assert 'write correction.kind = "none"' in output
    assert plan(*words, "correction.kind=binary").warnings == ()  # an indicator weighs nothing
    assert plan(*words, "correction.gates.it.high=1.1").warnings == ()
    assert plan("objective.name=cispo", "correction.kind=tis").warnings == ()


def test_fields_of_megatron_core_are_read_from_its_source():
    fields = megatron_fields(TRANSFORMER)
    assert {"num_moe_experts", "moe_aux_loss_coeff", "sequence_parallel", "q_lora_rank"} <= set(fields)
    assert {*TRANSFORMER.set_elsewhere, *TRANSFORMER.fixed, *TRANSFORMER.choices} <= set(fields)
    assert {*OPTIMIZER.set_elsewhere, *OPTIMIZER.choices} - NEW_IN_0_17 <= set(megatron_fields(OPTIMIZER))


NEW_IN_0_17 = {"muon_scalar_optimizer"}
"""Fields that 0.16 lacks."""


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("model.megatron.recompute_modules='core_attn'", ["wrong type", "Optional[List[str]]"]),
        ("model.megatron.recompute_modules=['core_attn']", ['needs model.recompute = "selective"']),
        ("model.megatron.recompute_modules=['corr']", ["'corr' is unknown; write some of core_attn"]),
        ("model.megatron.recompute_modules=['mla_up_proj']", ["needs multi-head latent attention"]),
        ("model.megatron.recompute_modules=['moe_act']", ["needs experts of transformer-engine, on a GPU"]),
        ("model.megatron.moe_aux_loss_coeff=true", ["wrong type"]),
        ("model.megatron.hidden_size=64", ["is decided by the model's config.json"]),
        ("optimizer.megatron.muon_momentun=0.9", ["did you mean muon_momentum?"]),
        ("optimizer.megatron.muon_momentum='high'", ["wrong type: OptimizerConfig.muon_momentum is float"]),
        ("optimizer.megatron.muon_num_ns_steps=2.5", ["wrong type", "is int"]),
        ("optimizer.megatron.lr=1e-3", ["is decided by optimizer.lr; set that instead"]),
        ("optimizer.megatron.use_distributed_optimizer=true", ["is decided by parallel.distributed_optimizer"]),
        ("optimizer.megatron.loss_scale=1.0", ["only float16 needs loss scaling"]),
        ("optimizer.megatron.optimizer='sgd'", ["checkpoints do not store; write adam or muon"]),
        ("optimizer.megatron.optimizer='muon'", ["set parallel.distributed_optimizer = false"]),
        ("optimizer.megatron.overlap_param_gather=true", ["needs parallel.distributed_optimizer = true and"]),
        ("optimizer.megatron.exp_avg_dtype='bfloat16'", ["needs optimizer.megatron.use_precision_aware_optimizer"]),
        ("optimizer.megatron.exp_avg_dtype='bf16'", ["wrong type", "torch.dtype"]),
        ("optimizer.megatron.use_precision_aware_optimizer=true", ["needs a GPU", "FusedAdam (RuntimeError)"]),
        (
            "optimizer.megatron.optimizer_cpu_offload=true",
            ["needs a GPU", "(KeyError)", "optimizer_offload_fraction", "bfloat16"],
        ),
    ],
)
def test_fields_of_megatron_core_are_checked_with_a_remedy(word, parts):
    output = problems(word)
    for part in parts:
        assert part in output
    assert f"command line: {word}" in output


@pytest.mark.parametrize("text", ["{", '{"model_type": "gpt2"}', '{"model_type": "qwen3_moe"}'])
def test_a_broken_or_unknown_model_config_is_one_of_the_problems(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    output = problems(f"model.path={tmp_path}", "train.updates_per_step=5")
    assert output.startswith("2 problems:")
    assert "config.json" in output


def test_check_begins_with_the_verdict_and_prints_settings_on_request(capsys):
    assert main(["check", str(DEMO), "train.steps=7"]) == 0
    output = capsys.readouterr().out
    first, second, third, *_ = output.splitlines()
    assert first.startswith("fits: the plan of 2 ranks needs")
    assert (second, third) == ("runs", "learns")
    for word in ("4 of 8 experts", "32 * 8 = 256"):
        assert word in output
    assert "transformer-engine" not in output
    assert main(["check", str(DEMO), "train.steps=7", "--settings"]) == 0
    output = capsys.readouterr().out
    for word in ("transformer-engine", "command line: train.steps=7", "demo.toml:"):
        assert word in output


def test_check_returns_what_train_returns_and_lists_problems_first(capsys):
    assert main(["check", str(DEMO), "train.stesp=7"]) == 2
    assert "did you mean train.steps?" in capsys.readouterr().err
    assert main(["check", str(DEMO), "parallel.tensor=3", "train.group_size=1", "train.prompts_per_step=256"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("whether it fits is unknown")
    assert lines[1:3] == ["does not run: 2 problems", "cannot learn: 1 problem"]
    assert all(line.startswith("problem: ") for line in lines[3:6])
    assert main(["train", str(DEMO), "parallel.tensor=3"]) == 2
    assert "attention heads" in capsys.readouterr().err


def test_a_plan_that_does_not_fit_is_a_problem(capsys):
    assert main(["check", str(DEMO), "cluster.gpu_memory_gib=0.1"]) == 2
    first, second, third, problem, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("does not fit: a rank needs")
    assert (second, third) == ("runs", "learns")
    assert "use more ranks, another layout" in problem


def test_check_without_configs_prints_versions(capsys):
    assert main(["check"]) == 0
    assert "megatron-core" in capsys.readouterr().out


def test_train_with_an_invalid_config_returns_2_without_traceback(capsys):
    assert main(["train", str(DEMO), "train.stesp=7"]) == 2
    output = capsys.readouterr().err
    assert output.startswith("megatron-rl train: unknown key train.stesp")
    assert "Traceback" not in output


def test_words_are_split_into_files_and_settings(tmp_path):
    odd = tmp_path / "a=b.toml"
    odd.write_text("")
    assert split_words(["x.toml", "a.b=1", str(odd)]) == (["x.toml", str(odd)], ["a.b=1"])


def test_a_mixture_with_a_tied_head_is_refused_for_sglang(tmp_path):
    folder = families.save("qwen2_moe", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))

    with pytest.raises(ConfigError, match="SGLang does not support for qwen2_moe: its head would have no weights"):
        make_plan(load(Run, [DEMO], [f"model.path={folder}", "rollout.engine=sglang"]), on_gloo=True)


def test_quantized_weights_are_refused_for_an_engine_that_would_serve_them(tmp_path):
    folder = families.save("gpt_oss", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    words = [f"model.path={folder}", "parallel.tensor=1", "parallel.expert=1", "weights.encoding=none"]
    with pytest.raises(ConfigError, match=r"sglang would start .* quantized weights \(MXFP4\).* weights\.encoding"):
        make_plan(load(Run, [DEMO], [*words, "rollout.engine=sglang"]))
    make_plan(load(Run, [DEMO], words))
