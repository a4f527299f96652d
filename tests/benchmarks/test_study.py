"""The study's queue, its statistics, and that docs/study.md is what the committed results say."""

import math
import multiprocessing
import random
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks.study.cells import PAPERS, SAFE, SEEDS, Condition, interleaved
from benchmarks.study.intervals import T_975, mean_of, paired, rate
from benchmarks.study.measures import at_tokens, collapsed, grouped, measures, reaches, smooth
from benchmarks.study.plan import DIFFER_ON_POLICY, PLAN, REFERENCE, real_cells
from benchmarks.study.queue import CURVES, pending, read_results, result, run_queue
from benchmarks.study.tables import REAL, TABLES, differences, fill, key_of
from benchmarks.study.worker import RunFailed, end_with_the_queue
from benchmarks.study.write import DOCS, pictures
from megatron_rl.config.load import load
from megatron_rl.config.schema import Run

STUDY = Path(__file__).parents[2] / "benchmarks" / "study"


def metrics(rewards, final=0.9, **columns):
    """Return what a run's metrics.jsonl holds, as far as the study reads it."""
    lines = [{"step": step, **dict.fromkeys(CURVES, 0.1), "reward_mean": reward} for step, reward in enumerate(rewards)]
    lines[0]["accuracy"] = 0.4
    for name, value in columns.items():
        for line in lines:
            line[name] = value
    return [*lines, {"step": len(rewards), "accuracy": final}]


CELLS = [*interleaved("grid", {"grpo": PAPERS["grpo"], "gspo": PAPERS["gspo"]}, [REFERENCE], seeds=3)]


def finished(cell, rewards=(0.4, 0.6, 0.8), final=0.9, **columns):
    """Return the line of a finished cell."""
    return result(cell, lambda cell: (metrics(list(rewards), final, **columns), 1.0))


def test_a_queue_goes_on_where_it_was_stopped(tmp_path):
    ran: list[str] = []

    def run(cell):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(cell.key)
        return metrics([0.4, 0.6, 0.8]), 1.0

    with pytest.raises(KeyboardInterrupt):
        run_queue(CELLS, run, tmp_path)
    assert [line["key"] for line in read_results(tmp_path)] == [cell.key for cell in CELLS[:2]]

    (tmp_path / "grid.jsonl").open("a").write('{"key": "cut o')  # killed while it wrote
    assert pending(CELLS, read_results(tmp_path)) == CELLS[2:]
    assert run_queue(CELLS, lambda cell: (metrics([0.5, 0.5, 0.5]), 1.0), tmp_path) == 4
    assert [line["key"] for line in read_results(tmp_path)] == [cell.key for cell in CELLS]
    assert run_queue(CELLS, run, tmp_path) == 0


def test_no_cell_is_begun_after_the_deadline(tmp_path):
    assert run_queue(CELLS, lambda cell: (metrics([0.4, 0.6, 0.8]), 1.0), tmp_path, deadline=time.time() - 1) == 0
    assert read_results(tmp_path) == []


def test_a_run_that_diverged_is_a_result_and_one_that_had_an_accident_is_not(tmp_path):
    def run(cell):
        raise RunFailed("a loss is NaN" if cell.variant == "gspo" else "no server", diverged=cell.variant == "gspo")

    run_queue(CELLS, run, tmp_path)
    lines = read_results(tmp_path)
    assert {line["variant"] for line in lines} == {"gspo"}
    assert all(collapsed(line) and not reaches(line) for line in lines)
    assert {cell.variant for cell in pending(CELLS, lines)} == {"grpo"}
    assert "3 of 3" in fill("<!-- table: conditions -->\n<!-- end -->", lines)


def test_the_plan_has_every_cell_once_and_every_cell_is_a_valid_run():
    assert len({cell.key for cell in PLAN}) == len(PLAN)
    for cell in (*PLAN, *real_cells()):
        if cell.seed == 0:
            run = load(Run, [STUDY / cell.config], [*cell.words, "model.path=folder"]).run
            assert (run.train.updates_per_step, run.optimizer.lr) == (cell.condition.updates, cell.condition.lr)
            assert run.train.prompts_per_step * run.train.group_size % cell.condition.updates == 0


def test_wherever_a_condition_stops_no_objective_is_more_than_one_seed_ahead():
    cells = [cell for cell in PLAN if cell.suite == "grid" and cell.condition == Condition(16, SAFE)]
    assert len(cells) == SEEDS * len(PAPERS)
    for stop in range(len(cells)):
        seeds = [sum(cell.variant == name for cell in cells[:stop]) for name in PAPERS]
        assert max(seeds) - min(seeds) <= 1


def test_the_interval_of_a_mean_is_students():
    interval = mean_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval.mean == 3.0
    assert interval.high - 3.0 == pytest.approx(2.7764 * math.sqrt(2.5 / 5), rel=1e-4)
    assert not mean_of([1.0]).excludes_zero
    assert mean_of([1.0]).text() == "1.000 (one seed)"
    assert mean_of([]).text() == "-"
    assert list(T_975) == sorted(T_975, reverse=True)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth():
    generator = random.Random(0)
    samples = [[generator.gauss(0.3, 0.1) for _ in range(5)] for _ in range(4000)]
    holds = sum(interval.low <= 0.3 <= interval.high for interval in map(mean_of, samples))
    assert holds / 4000 == pytest.approx(0.95, abs=0.014)  # four standard errors of 4000 draws


def test_a_paired_difference_takes_the_seeds_that_both_have():
    gap = paired({0: 0.5, 1: 0.7, 2: 0.9}, {1: 0.6, 2: 0.8, 3: 0.1})
    assert gap.count == 2
    assert gap.mean == pytest.approx(0.1)


def test_the_interval_of_a_rate_is_wilsons():
    interval = rate(0, 5)
    assert interval.low == pytest.approx(0, abs=1e-12)
    assert interval.high == pytest.approx(0.4345, abs=1e-4)
    assert rate(5, 5).low == pytest.approx(1 - 0.4345, abs=1e-4)
    assert rate(3, 10).low == pytest.approx(0.1078, abs=1e-4)
    assert rate(3, 10).high == pytest.approx(0.6032, abs=1e-4)


def test_measures_of_a_run():
    line = finished(CELLS[0], (0.4, 0.6, 0.8, 0.9, 0.9), 0.95, clipped_fraction=0.2, gradient_fraction=0.6,
                    response_tokens_mean=10.0)  # fmt: skip
    assert smooth([0.4, 0.6, 0.8, 0.9]) == pytest.approx([0.4, 0.5, 0.6, 0.76667], abs=1e-5)
    found = measures(line, tokens=2560 * 2.5)
    assert found["final"] == 0.95
    assert found["along"] == pytest.approx(0.72)
    assert found["kept"] == pytest.approx(0.75)
    assert found["steps80"] == 5
    assert found["at_tokens"] == pytest.approx(0.55)
    assert at_tokens(line, 1e9) == smooth(line["curves"]["reward_mean"])[-1]
    assert reaches(line)
    assert not collapsed(line)
    assert collapsed(finished(CELLS[0], final=0.39))


def test_differences_are_bold_only_where_the_interval_leaves_out_zero():
    sure = [finished(cell, final=0.9 if cell.variant == "gspo" else 0.5 + 0.01 * cell.seed) for cell in CELLS]
    assert "**+0.39" in differences(grouped(sure), [("gspo", "grpo")], ("final",), [key_of(REFERENCE)])[-1]
    open_ = [finished(cell, final=0.5 + 0.1 * cell.seed * (cell.variant == "gspo")) for cell in CELLS]
    assert "**" not in differences(grouped(open_), [("gspo", "grpo")], ("final",), [key_of(REFERENCE)])[-1]


def test_pictures_are_well_formed_and_have_a_line_for_each_objective():
    drawn = pictures([finished(cell) for cell in CELLS])
    assert len(drawn) == 3
    for text in drawn.values():
        assert len(ET.fromstring(text).findall("{*}polyline")) == 2


def test_a_page_names_only_tables_that_exist():
    with pytest.raises(ValueError, match='no table "nothing"'):
        fill("<!-- table: nothing -->\n<!-- end -->", [])
    with pytest.raises(ValueError, match="no end of it"):
        fill("<!-- table: windows -->\n", [])


def test_the_page_is_what_the_results_say():
    lines = read_results()
    page = (DOCS / "study.md").read_text()
    assert fill(page, lines) == page, "run: python -m benchmarks.study write"
    assert all(f"<!-- table: {name} -->" in page for name in (*TABLES, REAL))
    for name, text in pictures(lines).items():
        assert (DOCS / "study" / name).read_text() == text


def test_on_policy_the_runs_of_objectives_with_the_same_gradient_are_the_same():
    """With one update every ratio is 1: that is why one seed of GSPO, SAPO and SSPO is enough."""
    cells = [line for line in read_results() if (line["updates"], line["lag"], line["seed"]) == (1, 0, 0)]
    for lr in {line["lr"] for line in cells}:
        runs = {line["variant"]: line["curves"]["reward_mean"] for line in cells if line["lr"] == lr}
        alike = [runs[name] for name in PAPERS if name in runs and name not in DIFFER_ON_POLICY]
        assert all(run == runs["grpo"] for run in alike)


def test_every_result_is_a_cell_of_the_plan():
    known = {cell.key for cell in (*PLAN, *real_cells())}
    for line in read_results():
        assert line["key"] in known
        assert line["key"].endswith(" ".join(line["words"]))


def _wait_in_a_thread():
    end_with_the_queue()
    time.sleep(60)


def _queue(pipe):
    child = multiprocessing.get_context("forkserver").Process(target=_wait_in_a_thread)
    child.start()
    pipe.send(child.pid)
    time.sleep(60)


def test_runs_end_with_a_queue_that_is_killed():
    ours, theirs = multiprocessing.Pipe()
    queue = multiprocessing.get_context("spawn").Process(target=_queue, args=(theirs,))
    queue.start()
    assert ours.poll(30)
    run = ours.recv()
    queue.kill()
    queue.join()
    deadline = time.monotonic() + 10
    while _runs(run):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
