"""Tasks and rewards in real runs."""

import json
import re
import signal

import psutil
import pytest

from tests.e2e.job import ONE_RANK, ROOT, Job, same_result


def test_verifiers_that_fail_are_counted_and_told_and_the_run_goes_on(tmp_path):
    (tmp_path / "sums.jsonl").write_text("".join(f'{{"prompt": "{a}+1=", "answer": {a + 1}}}\n' for a in range(8)))
    (tmp_path / "mine.py").write_text(
        "import math, time\n"
        "def verify(prompt, response, answer):\n"
        "    a = int(prompt[0])\n"
        "    if a == 1: raise RuntimeError('bad luck')\n"
        "    if a == 2: time.sleep(100)\n"
        "    return math.nan if a == 3 else len(response) % 3\n"
    )
    settings = [
        "task.name=jsonl",
        "task.heldout_fraction=0",
        f"task.path={tmp_path / 'sums.jsonl'}",
        f"task.verifier={tmp_path / 'mine.py'}:verify",
        "task.max_prompt_tokens=16",
        "train.tokens_per_microbatch=8192",
        "train.steps=2",
        "train.group_size=2",
        "train.prompts_per_step=8",
        "train.updates_per_step=1",
        "reward.seconds=1",
        "reward.workers=1",
        "reward.format=.*#\\d",
        "reward.weights={ format = 0.5 }",
        "advantage.kind=gdpo",
    ]
    with Job(tmp_path / "run", *ONE_RANK, *settings) as job:
        assert job.end() == 0, job.output()
        lines = job.metrics()
        said = job.output()
    samples = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    for line in lines:
        ended = [s for s in samples if s["step"] == line["step"] and s["finish_reason"] == "stop"]
        starts = [sample["prompt"][0] for sample in ended]
        assert line["unverified_raised"] == starts.count("1")
        assert line["unverified_timed_out"] == starts.count("2")
        assert line["unverified_invalid"] == starts.count("3")
        assert 0 <= line["reward/format"] <= 1
        assert line["grad_norm"] > 0
    assert sum(line["unverified_raised"] for line in lines) > 0
    assert "responses unverified (" in said
    assert "responses unverified (" in (tmp_path / "run" / "console.log").read_text()
    assert {sample["reward"] for sample in samples if sample["prompt"][0] in "123"} <= {None, 0.0, 0.5}
    assert all(set(sample["rewards"]) == {"task", "format"} for sample in samples if sample["reward"] is not None)


def test_a_run_killed_while_processes_verify_goes_on_to_the_same_result_and_leaves_none_behind(tmp_path):
    (tmp_path / "sums.jsonl").write_text("".join(f'{{"prompt": "{a}+1=", "answer": {a + 1}}}\n' for a in range(8)))
    held, hold = tmp_path / "held", tmp_path / "hold"
    (tmp_path / "mine.py").write_text(
        "import os, pathlib, time\n"
        "HERE = pathlib.Path(__file__).parent\n"
        "def verify(prompt, response, answer):\n"
        "    while (HERE / 'hold').exists():\n"
        "        (HERE / 'held').write_text(str(os.getpid()))\n"
        "        time.sleep(0.01)\n"
        "    if prompt[0] == '1': raise RuntimeError('bad luck')\n"
        "    return len(response) % 3\n"
    )
    settings = [
        "task.name=jsonl",
        "task.heldout_fraction=0",
        f"task.path={tmp_path / 'sums.jsonl'}",
        f"task.verifier={tmp_path / 'mine.py'}:verify",
        "task.max_prompt_tokens=16",
        "train.updates_per_step=1",
        "reward.seconds=100",
        "checkpoint.every=1",
        "train.steps=3",
    ]
    with Job(tmp_path / "straight", *ONE_RANK, *settings) as job:
        assert job.end() == 0, job.output()
        assert sum(line["unverified_raised"] for line in job.metrics()) > 0
    with Job(tmp_path / "run", *ONE_RANK, *settings) as job:
        job.until_steps(1)
        hold.touch()
        job.until(held.exists)
        assert len(job.metrics()) < 3
        verifiers = [p for p in job.look() if "megatron_rl.tasks.worker" in p.cmdline()]
        assert len(verifiers) == 3  # the one that hands out, and two that verify
        for victim in (job.process, *job.ranks()):
            victim.kill()
        assert job.end() == -signal.SIGKILL
        assert not [p for p in verifiers if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    hold.unlink()
    with Job(tmp_path / "run", *ONE_RANK, *settings, "train.resume=true") as job:
        assert job.end() == 0, job.output()
    same_result(tmp_path / "run", tmp_path / "straight")


def test_a_calculator_takes_its_turns_and_only_what_was_sampled_is_trained(tmp_path):
    overlay = str(ROOT / "configs" / "environment" / "calculator.toml")
    sampling = ["rollout.sampling.max_new_tokens=40", "train.steps=3", "train.prompts_per_step=8"]
    with Job(tmp_path / "run", *ONE_RANK, *sampling, overlays=[overlay]) as job:
        assert job.end() == 0, job.output()
        lines = job.metrics()
    samples = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    steps = [step for sample in samples for step in re.findall(r"(\d)([+*-])(\d)=(\d);", sample["response"])]
    assert len(steps) > 50
    assert all(str(eval(f"({a}{sign}{b}) % 10")) == result for a, sign, b, result in steps)
    for line in lines:
        here = [sample for sample in samples if sample["step"] == line["step"]]
        observed = sum(len(re.findall(r"=\d;", sample["response"])) for sample in here) * 2
        tokens = sum(sample["tokens"] for sample in here)
        assert observed > 0
        assert line["response_tokens_mean"] == pytest.approx((tokens - observed) / len(here))
        assert line["mismatch_max"] < 1e-4  # the trainer's own log-probs of what the engine sampled between the results
        assert line["first_ratio_max"] == 1.0
        assert line["grad_norm"] > 0
