"""The first lines of a run."""

from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.run_plan import make_plan
from megatron_rl.launch.startup_lines import startup_lines

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.toml"
FOUND = {"megatron-rl": "0.1.0", "torch": "2.13.0", "megatron-core": "0.19.2", "python": "3.12.1", "gpus": None}


def lines(*words: str) -> list[str]:
    loaded = load(Run, [DEMO], words)
    return list(startup_lines(loaded.run, make_plan(loaded).layout, FOUND))


def test_five_lines_say_what_starts():
    assert lines() == [
        "2 ranks on CPU: tensor 2, expert 2; float32",
        f"model {DEMO.parent / 'demo-model'}",
        "chained_arithmetic, espo: 60 steps of 32 prompts with 8 responses, 4 updates per step",
        "servers: 1 of embedded, started here",
        "megatron-rl 0.1.0, torch 2.13.0, megatron-core 0.19.2, python 3.12.1; log: runs/demo/console.log",
    ]


def test_one_rank_has_no_parallelism():
    assert lines("parallel.tensor=1", "parallel.expert=1")[0] == "1 rank on CPU: no parallelism; float32"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ('rollout.urls=["http://user:secret@10.0.0.7:30000"]', "servers: embedded at http://"),
        ("rollout.registry=fleet", "servers: 1 of embedded, listed in "),
    ],
)
def test_running_servers_are_named_without_their_passwords(word, said):
    line = lines(word)[3]
    assert line.startswith(said)
    assert "secret" not in line
