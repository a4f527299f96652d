"""The study of the objectives: its queue, its statistics, and docs/study.md against the committed results."""

import math
import random
import xml.etree.ElementTree as ET

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from studies.objectives.cells import DIFFER_ON_POLICY, PAPERS, PLAN, REAL_PLAN, REFERENCE, Cell
from studies.objectives.measures import T_975, collapsed, grouped, mean_of, measures, paired, smooth
from studies.objectives.page import DOCS, PICTURES, TABLES, fill, pictures
from studies.objectives.runs import CURVES, FOLDER, RunFailed, pending, read_results, result, run_pending


def metrics(rewards, final=0.9, **columns):
    """Return the lines of a metrics.jsonl, with the keys that the study reads."""
    lines = [{"step": step, **dict.fromkeys(CURVES, 0.1), "reward_mean": reward} for step, reward in enumerate(rewards)]
    lines[0]["accuracy"] = 0.4
    for name, value in columns.items():
        for line in lines:
            line[name] = value
    return [*lines, {"step": len(rewards), "accuracy": final}]


CELLS = [Cell("grid", name, PAPERS[name], REFERENCE, seed) for seed in range(3) for name in ("grpo", "gspo")]


def finished(cell, rewards=(0.4, 0.6, 0.8), final=0.9, **columns):
    """Return the result of a finished cell."""
    return result(cell, lambda cell: (metrics(list(rewards), final, **columns), 1.0))


def test_a_stopped_queue_continues_with_the_cells_that_have_no_result(tmp_path):
    ran: list[str] = []

    def run(cell):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(cell.key)
        return metrics([0.4, 0.6, 0.8]), 1.0

    with pytest.raises(KeyboardInterrupt):
        run_pending(CELLS, run, tmp_path)
    assert [line["key"] for line in read_results(tmp_path)] == [cell.key for cell in CELLS[:2]]

    (tmp_path / "grid.jsonl").open("a").write('{"key": "cut o')  # killed while it wrote
    assert pending(CELLS, read_results(tmp_path)) == CELLS[2:]
    assert run_pending(CELLS, lambda cell: (metrics([0.5, 0.5, 0.5]), 1.0), tmp_path) == 4
    assert [line["key"] for line in read_results(tmp_path)] == [cell.key for cell in CELLS]
    assert run_pending(CELLS, run, tmp_path) == 0


def test_a_run_that_diverged_is_a_result_and_one_that_had_an_accident_is_not(tmp_path):
    def run(cell):
        raise RunFailed("a loss is NaN" if cell.variant == "gspo" else "no server", diverged=cell.variant == "gspo")

    run_pending(CELLS, run, tmp_path)
    lines = read_results(tmp_path)
    assert {line["variant"] for line in lines} == {"gspo"}
    assert all(collapsed(line, 0.5) for line in lines)
    assert {cell.variant for cell in pending(CELLS, lines)} == {"grpo"}


def test_every_cell_of_the_plan_is_unique_and_a_valid_run():
    assert len({cell.key for cell in (*PLAN, *REAL_PLAN)}) == len(PLAN) + len(REAL_PLAN)
    for cell in (*PLAN, *REAL_PLAN):
        if cell.seed == 0:
            run = load(Run, [FOLDER / cell.config], [*cell.words, "model.path=folder"]).run
            assert (run.train.updates_per_step, run.optimizer.lr) == (cell.condition.updates, cell.condition.lr)
            assert run.train.prompts_per_step * run.train.group_size % cell.condition.updates == 0


def test_the_interval_of_a_mean_is_students():
    interval = mean_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval.mean == 3.0
    assert interval.half == pytest.approx(2.7764 * math.sqrt(2.5 / 5), rel=1e-4)
    assert not mean_of([1.0]).excludes_zero
    assert (mean_of([1.0]).text(), mean_of([]).text(), interval.text()) == ("1.000", "-", "3.000 +-1.963")
    assert list(T_975) == sorted(T_975, reverse=True)


def test_ninety_five_of_a_hundred_intervals_contain_the_truth():
    generator = random.Random(0)
    samples = [[generator.gauss(0.3, 0.1) for _ in range(5)] for _ in range(4000)]
    hits = sum(abs(interval.mean - 0.3) <= interval.half for interval in map(mean_of, samples))
    assert hits / 4000 == pytest.approx(0.95, abs=0.014)  # four standard errors of 4000 draws


def test_a_paired_difference_uses_the_seeds_that_both_have():
    gap = paired({0: 0.5, 1: 0.7, 2: 0.9}, {1: 0.6, 2: 0.8, 3: 0.1})
    assert gap.count == 2
    assert gap.mean == pytest.approx(0.1)


def test_measures_of_a_run():
    line = finished(CELLS[0], (0.4, 0.6, 0.8, 0.9, 0.9), 0.95, clipped_fraction=0.2, gradient_fraction=0.6)
    assert smooth([0.4, 0.6, 0.8, 0.9]) == pytest.approx([0.4, 0.5, 0.6, 0.76667], abs=1e-5)
    found = measures(line)
    assert found["final"] == 0.95
    assert found["training"] == pytest.approx(0.72)
    assert found["tokens"] == pytest.approx(0.75)
    assert not collapsed(line, 1.0)
    assert collapsed(finished(CELLS[0], final=0.39), 1.0)
    assert not collapsed(finished(CELLS[0], final=0.39), 0.5)


def test_differences_are_bold_only_where_the_interval_excludes_zero():
    sure = [finished(cell, (0.9,) * 3 if cell.variant == "gspo" else (0.5 + 0.01 * cell.seed,) * 3) for cell in CELLS]
    assert "**+0.390" in TABLES["in training"](grouped(sure))[-1]
    unsure = [finished(cell, (0.5 + 0.1 * cell.seed * (cell.variant == "gspo"),) * 3) for cell in CELLS]
    assert "**" not in TABLES["in training"](grouped(unsure))[-1]


def test_a_page_names_only_tables_that_exist():
    with pytest.raises(ValueError, match='no table "nothing"'):
        fill("<!-- table: nothing -->\n<!-- end -->", [])
    with pytest.raises(ValueError, match="no end of it"):
        fill("<!-- table: variants -->\n", [])


def test_the_tables_and_pictures_of_the_page_follow_from_the_results():
    lines = read_results()
    page = (DOCS / "study.md").read_text()
    assert fill(page, lines) == page, "run: python -m studies.objectives write"
    assert all(f"<!-- table: {name} -->" in page for name in TABLES)
    drawn = pictures(lines)
    assert {f"{name}.svg" for name in drawn} == {file.name for file in (DOCS / "study").iterdir()}
    for name, text in drawn.items():
        assert f"(study/{name}.svg)" in page
        assert all(f">{objective}<" in text for objective in PAPERS)
        ET.fromstring(text)
    assert list(drawn) == list(PICTURES)


def test_with_one_update_objectives_with_the_same_gradient_give_the_same_run():
    """With one update every ratio is 1: one seed of GSPO, SAPO and SSPO is enough."""
    cells = [line for line in read_results() if (line["updates"], line["lag"], line["seed"]) == (1, 0, 0)]
    for lr in {line["lr"] for line in cells}:
        runs = {line["variant"]: line["curves"]["reward_mean"] for line in cells if line["lr"] == lr}
        alike = [runs[name] for name in PAPERS if name in runs and name not in DIFFER_ON_POLICY]
        assert all(run == runs["grpo"] for run in alike)


def test_every_result_is_a_cell_of_the_plan():
    known = {cell.key for cell in (*PLAN, *REAL_PLAN)}
    for line in read_results():
        assert line["key"] in known
        assert line["key"].endswith(" ".join(line["words"]))
