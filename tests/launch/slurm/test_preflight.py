"""The preflight: the comparison of node reports, and the link test on real ranks."""

import json
from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.distributed.links import measure_links
from megatron_rl.errors import TrainingError
from megatron_rl.launch.slurm import preflight
from megatron_rl.launch.slurm.preflight import find_problems, judge, report
from tests.ranks import run_ranks

pytestmark = pytest.mark.processes

DEMO = Path(__file__).parents[3] / "configs" / "demo.toml"


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, object]]:
    """Return the report of this machine under the names of three nodes."""
    found = {}
    (tmp_path / "run").mkdir()
    run = load(Run, [str(DEMO)], [f"log.path={tmp_path / 'run'}"]).run
    for node in ("a", "b", "c"):
        monkeypatch.setenv("SLURMD_NODENAME", node)
        assert report(run, tmp_path / "reports") == 0
        found[node] = json.loads((tmp_path / "reports" / f"{node}.json").read_text())
    return found


def test_equal_nodes_pass(facts, tmp_path, capsys):
    assert judge(tmp_path / "reports", ["a", "b", "c"], needed=2) == 0

    assert (tmp_path / "reports" / "nodes").read_text() == "a b\n"
    assert "preflight:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("torch", "2.9.0", "has torch 2.9.0, the others have 2."),
        ("config", "0123", "has config 0123, the others have"),
        ("clock_seconds", -90.0, "has a clock that differs by -90 s"),
        ("problems", ["cannot write to the run folder"], "cannot write to the run folder"),
    ],
)
def test_a_node_that_differs_is_faulty(facts, tmp_path, name, value, message):
    facts["b"][name] = value

    problems = find_problems(facts, ["a", "b", "c"], tmp_path)

    assert (problems["a"], problems["c"]) == ([], [])
    assert message in problems["b"][0]


def test_a_node_without_a_report_is_replaced_by_a_spare_one(facts, tmp_path, capsys):
    (tmp_path / "reports" / "a.json").unlink()

    assert judge(tmp_path / "reports", ["a", "b", "c"], needed=2, wait_seconds=0.1) == 0
    assert (tmp_path / "reports" / "nodes").read_text() == "b c\n"
    assert judge(tmp_path / "reports", ["a", "b", "c"], needed=3, wait_seconds=0.1) == 1
    assert "3 nodes are needed and 2 of 3 are good" in capsys.readouterr().out


def test_links_are_checked_and_timed_by_the_first_rank():
    first, second = run_ranks(measure_links, 2, 60.0, initialize=False)

    assert second is None
    assert first is not None
    assert [line.split(":")[1].split(" over")[0] for line in first.splitlines()] == [" all-reduce", " all-to-all"]


def test_ranks_that_cannot_connect_are_told_which_variable_to_set(tmp_path, monkeypatch):
    def fail(timeout_seconds):
        raise RuntimeError("Gloo connectFullMesh failed\nsecond line")

    monkeypatch.setattr(preflight, "measure_links", fail)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(
        TrainingError, match=r"rank 0 at 10\.0\.0\.1:.*of the host name: Gloo connectFullMesh failed; .*"
    ):
        preflight.link(tmp_path, 1.0)
