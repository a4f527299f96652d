"""The console of a run: columns that fit, lines of steps, and the status line of a terminal."""

import logging
import re
from itertools import pairwise

import pytest

from megatron_rl.observability.console import ConsoleTable
from megatron_rl.observability.console_columns import COLUMNS, StepRow, duration, fitting_columns, header_line, row_line
from megatron_rl.observability.recorder import RunRecorder

LOG = logging.getLogger("megatron_rl.test")
METRICS = {
    "reward_mean": -0.25,
    "accuracy": 0.5,
    "response_tokens_mean": 12345.6,
    "truncated_fraction": 1.0,
    "zero_variance_fraction": 1.0,
    "entropy_mean": 10.123,
    "clipped_fraction": 1.0,
    "grad_norm": 1.5e-10,
    "lr": 1e-6,
    "mismatch_max": 1e-3,
    "tokens": 4_000_000,
}
SECONDS = {"start": 10.0, "rollout": 1.0, "train": 3.0, "fleet": 2.0, "total": 14.0}
WIDTHS = (80, 100, 120, 140, 160, 200)


def headers(width: int, total_steps: int = 60) -> list[str]:
    return [column.header for column in fitting_columns(width, total_steps)]


@pytest.fixture
def terminal(monkeypatch):
    """A function that gives the terminal a size."""

    def resize(columns: int, lines: int, term: str = "xterm-256color") -> None:
        for name, value in {"COLUMNS": str(columns), "LINES": str(lines), "TERM": term}.items():
            monkeypatch.setenv(name, value)

    return resize


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("steps", [60, 100_000])
def test_a_line_fits_into_the_terminal(width, steps):
    columns = fitting_columns(width, steps)
    row = row_line(columns, StepRow(steps - 1, steps, METRICS, SECONDS, 360_000.0), width)
    assert len(header_line(columns, 1000)) <= width
    assert len(row) <= width
    assert "100 h" in row
    assert {"step", "reward", "accuracy", "entropy", "clipped", "mismatch", "tokens/s", "left"} <= {
        column.header for column in columns
    }


def test_a_wider_terminal_shows_more():
    sets = [set(headers(width)) for width in WIDTHS]
    assert all(narrow <= wide for narrow, wide in pairwise(sets))
    assert sets[0] == {column.header for column in COLUMNS if column.rank == 0}
    assert sets[-1] == {column.header for column in COLUMNS}


def test_a_list_of_phases_that_is_too_long_is_cut_off_on_the_terminal_only(capsys, terminal):
    terminal(140, 24)
    phases = {f"phase{number}": 1.0 for number in range(9)} | {"total": 9.0}
    table = ConsoleTable(10, terminal=True)
    logged = table.add_row(0, METRICS, phases)
    table.close()
    shown = [text for text in capsys.readouterr().out.splitlines() if "phase0" in text]
    assert len(shown) == 1
    assert shown[0].endswith("...")
    assert logged[1].endswith("phase8 1.0")


def test_cells_have_a_dash_for_missing_values():
    row = StepRow(4, 30, {"tokens": 1000}, {"rollout": 1.0, "fetch": 0.01, "train": 3.0, "total": 4.0}, 65.0)
    cells = {column.header: column.cell(row) for column in COLUMNS}
    assert (cells["step"], cells["reward"], cells["tokens/s"], cells["left"]) == ("4/30", "-", "250", "1:05")
    assert (cells["seconds"], cells["seconds by phase"]) == ("4.0", "rollout 1.0, train 3.0")
    assert duration(3723) == "1:02:03"


def test_the_time_left_follows_the_latest_steps_and_not_the_start(capsys):
    table = ConsoleTable(10)
    table.add_row(0, {}, {"start": 30.0, "total": 34.0})
    table.add_row(1, {}, {"rollout": 2.0, "total": 2.0})
    assert [text.split()[-3] for text in capsys.readouterr().out.splitlines()[1:]] == ["0:36", "0:24"]


def test_on_a_terminal_every_step_stays_and_the_status_line_is_below(tmp_path, capsys, terminal):
    terminal(80, 10)
    gauges = [("server_sequences", "", 24.0, {}), ("queue_groups", "", 3.0, {"state": "finished"})]
    with RunRecorder(tmp_path, 30, terminal=True) as recorder:
        recorder.register_gauges(lambda: gauges)
        for step in range(20):
            with recorder.phase("rollout"):
                pass
            if step == 5:
                LOG.info("a message")
            recorder.write(step, {"reward_mean": step / 100})
    output = capsys.readouterr().out
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    for step in range(20):
        assert len(re.findall(rf"[\r\n] *{step}/30 ", plain)) == 1
    assert plain.count("reward") == 3  # the header of each screen of ten lines
    assert plain.count("a message") == 1
    assert "step 0/30  start 0:00" in plain
    assert re.search(r"step \d+/30  rollout 0:00  24 sequences in progress  3 groups ready", plain)
    log = (tmp_path / "console.log").read_text()
    assert (log.count("reward"), log.count("/30")) == (1, 20)
    assert "sequences in progress" not in log


def test_a_dumb_terminal_gets_plain_lines(tmp_path, capsys, terminal):
    terminal(80, 24, "dumb")
    with RunRecorder(tmp_path, 3, terminal=True) as recorder:
        with recorder.phase("rollout"):
            pass
        recorder.write(0, METRICS)
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert len(output.splitlines()) == 2


def test_a_resumed_run_begins_its_status_with_its_step(tmp_path, capsys, terminal):
    terminal(80, 24)
    with RunRecorder(tmp_path, 30, 12, terminal=True):
        pass
    assert "step 12/30" in capsys.readouterr().out
