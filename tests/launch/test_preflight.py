"""The preflight's verdicts, from reports of nodes that are unlike each other, and its links on real ranks."""

import json
from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.distributed.links import measure_links
from megatron_rl.launch.slurm.preflight import judge, report, verdicts_on
from tests.ranks import run_ranks

DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, object]]:
    """What this machine reports of itself, as three nodes."""
    found = {}
    (tmp_path / "run").mkdir()
    run = load(Run, [str(DEMO)], [f"log.path={tmp_path / 'run'}"]).run
    for node in ("a", "b", "c"):
        monkeypatch.setenv("SLURMD_NODENAME", node)
        assert report(run, tmp_path / "reports") == 0
        found[node] = json.loads((tmp_path / "reports" / f"{node}.json").read_text())
    return found


def test_like_nodes_are_fit(facts, tmp_path, capsys):
    assert judge(tmp_path / "reports", ["a", "b", "c"], needed=2) == 0

    assert (tmp_path / "reports" / "nodes").read_text() == "a b\n"
    assert "preflight:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("torch", "2.9.0", "has torch 2.9.0, the others have 2."),
        ("config", "0123", "has config 0123, the others have"),
        ("clock_seconds", -90.0, "has a clock that is -90 s off"),
        ("problems", ["cannot write to the run folder"], "cannot write to the run folder"),
    ],
)
def test_a_node_unlike_the_others_is_odd(facts, tmp_path, name, value, message):
    facts["b"][name] = value

    verdicts = verdicts_on(facts, ["a", "b", "c"], tmp_path)

    assert (verdicts["a"], verdicts["c"]) == ([], [])
    assert message in verdicts["b"][0]


def test_a_node_that_does_not_report_is_left_out_if_there_are_others(facts, tmp_path, capsys):
    (tmp_path / "reports" / "a.json").unlink()

    assert judge(tmp_path / "reports", ["a", "b", "c"], needed=2, wait_seconds=0.1) == 0
    assert (tmp_path / "reports" / "nodes").read_text() == "b c\n"
    assert judge(tmp_path / "reports", ["a", "b", "c"], needed=3, wait_seconds=0.1) == 1
    assert "3 nodes are needed and 2 of 3 are fit" in capsys.readouterr().out


def test_links_are_checked_and_timed_by_the_first_rank():
    first, second = run_ranks(measure_links, 2, 60.0, initialize=False)

    assert second is None
    assert first is not None
    assert [line.split(":")[1].split(" over")[0] for line in first.splitlines()] == [" all-reduce", " all-to-all"]
