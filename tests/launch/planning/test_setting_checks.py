"""Settings with which a run would fail later, or learn nothing, are found before it starts."""

from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.run_plan import make_plan
from megatron_rl.launch.planning.setting_checks import check_learning, check_settings, setting_warnings

DEMO = Path(__file__).parents[3] / "configs" / "demo.toml"


def problems(tmp_path: Path, *words: str) -> list[str]:
    loaded = load(Run, [DEMO], words)
    return [*check_settings(loaded, None), *check_learning(loaded), *setting_warnings(loaded)]


def test_the_demo_has_no_problem(tmp_path):
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["train.group_size=1"], "every advantage would be 0"),
        (["reward.weights={task=0}"], "all rewards have the weight 0"),
        (["rollout.sampling.top_k=1"], "all responses to a prompt would be the same"),
        (['rollout.urls=["10.0.0.7:30000"]'], "does not begin with http"),
        (['rollout.urls=["localhost:30000"]'], "does not begin with http"),
        (['rollout.urls=["http://"]'], "names no host"),
        (['rollout.urls=["http://h:99999"]'], "is no address"),
        (['rollout.urls=["http://h:x"]'], "is no address"),
        (['rollout.urls=["http://[::1"]'], "is no address"),
        (['rollout.urls=["http://h:0"]'], "has the port 0"),
        (['rollout.urls=["http://h:1?x=1"]'], "has a query"),
        (['rollout.urls=["http://h:1", "http://h:1/"]'], "is there 2 times"),
        (["optimizer.warmup_steps=100000"], "never reaches optimizer.lr"),
        (["optimizer.schedule=cosine", "optimizer.min_lr=1"], "the learning rate rises"),
    ],
)
def test_a_mistake_is_one_problem(tmp_path, words, found):
    (problem,) = problems(tmp_path, *words)
    assert found in problem


def test_evaluation_needs_held_out_prompts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "answer": "7"}\n')
    (tmp_path / "a.toml").write_text(
        f'[model]\npath = "x"\n[task]\nname = "jsonl"\npath = "{tmp_path}/a.jsonl"\nheldout_fraction = 0.0\n'
    )

    def found(*words: str) -> list[str]:
        return list(check_settings(load(Run, [tmp_path / "a.toml"], words), None))

    assert found("evaluate.every=0") == []
    (problem,) = found("evaluate.every=5")
    assert "no prompt is held out" in problem
    assert found("evaluate.every=5", "task.heldout_fraction=0.1") == []


def test_a_stop_token_that_the_model_lacks_is_found_by_the_plan():
    with pytest.raises(ValueError, match="the model has no token 1000000"):
        make_plan(load(Run, [DEMO], ["rollout.sampling.stop_token_ids=[1000000]"]))
