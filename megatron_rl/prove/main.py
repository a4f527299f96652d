"""``megatron-rl prove``: one real training step in many layouts, each compared with one rank in float64."""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.algorithms.objectives import OBJECTIVES, AnyObjective
from megatron_rl.config.load import Loaded, load
from megatron_rl.config.schema import Run
from megatron_rl.config.section import Section
from megatron_rl.data.files import load_batch, save_batch
from megatron_rl.errors import ConfigError
from megatron_rl.launch.planning.layout import check_layout, layout_of
from megatron_rl.launch.planning.model_sizes import model_sizes
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.prove.case import CASE, RESULT, RUNS, SizeOverrides, make_batch, make_model, perturbed_logprobs
from megatron_rl.prove.compare import TOLERANCES, Differences, differences
from megatron_rl.prove.layouts import DEFAULT, LayoutRun, layout_runs, reference
from megatron_rl.prove.ranks import run_forked
from megatron_rl.util.atomic import replace_text
from megatron_rl.util.console import make_console


class ObjectiveChoice(Section):
    """The value of ``--objective``."""

    objective: AnyObjective


def prove(
    loaded: Loaded[Run],
    layouts: Sequence[str],
    shrink: str | None = None,
    objectives: Sequence[str] = (),
    output: Path | None = None,
    max_ranks: int = 4,
) -> int:
    """Print the table of differences; return 0 if all are within the tolerance, else 1.

    Args:
        loaded: the configuration, whose model, precision and objective are used.
        layouts: layouts such as ``tensor=2,expert=2``; if empty, those of the default set that the model supports.
        shrink: sizes of a smaller model with random weights, such as ``layers=2,hidden=64``.
        objectives: names of objectives, or ``path/to/file.py:Class``; if empty, the one of the configuration.
        output: file to write the results to, as JSON.
        max_ranks: largest number of ranks of a layout of the default set.

    Raises:
        ConfigError: a layout, a size or an objective is invalid.
    """
    console = make_console()
    with tempfile.TemporaryDirectory(prefix="megatron-rl-prove-") as temporary:
        folder = Path(temporary)
        model = make_model(loaded.run, None if shrink is None else SizeOverrides.parse(shrink), folder / "model")
        run = with_model(loaded.run, model)
        hf = read_hf_config(Path(model))
        family = family_of(hf)
        selected, skipped = _select_layouts(loaded, run, layouts, max_ranks)
        case = folder / CASE
        save_batch(make_batch(family.vocab_size, seed=run.train.seed), case)
        objective_runs = _with_objectives(run, objectives)
        labels = ", ".join(each.objective.label for each in objective_runs)
        console.print(
            f"reference: one rank, float64; {family.num_layers} layers, hidden size {hf['hidden_size']}, {labels}"
        )
        expected = _run(reference(run), objective_runs, case, folder / "reference")
        _add_old_logprobs(case, expected)
        table = Table("layout", "ranks", "objective", *COLUMNS, "verdict")
        records: list[dict[str, object]] = []
        for number, layout in enumerate(selected):
            began = time.perf_counter()
            results = _run(layout, objective_runs, case, folder / f"layout_{number}")
            tolerance = TOLERANCES[layout.run.model.dtype]
            for objective in (each.objective for each in objective_runs):
                found = differences(results, expected, objective.name, tolerance)
                row = {"layout": layout.text, "ranks": layout.ranks, "objective": objective.name}
                records.append(row | found.record())
                table.add_row(*_cells(layout, objective.label, found))
            failed = [r for r in records if r["layout"] == layout.text and not r["holds"]]
            verdict = "pass" if not failed else "FAIL: " + "; ".join(str(r["reasons"]) for r in failed)
            console.print(f"  {layout.text}: {verdict} ({time.perf_counter() - began:.0f} s)", markup=False)
    console.print(table)
    for text, reason in skipped.items():
        console.print(f"skipped: {text}: {reason}", markup=False, style="dim")
    bad = [record for record in records if not record["holds"]]
    console.print(f"{len(records) - len(bad)} of {len(records)} pass with the tolerance of {run.model.dtype}")
    if output is not None:
        _write_results(output, run.model.dtype, records)
    return 1 if bad else 0


def _write_results(output: Path, dtype: str, records: Sequence[Mapping[str, object]]) -> None:
    report = {"dtype": dtype, "tolerance": vars(TOLERANCES[dtype]), "results": records}
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(output, json.dumps(report, indent=2) + "\n")


COLUMNS = ("log-prob", "entropy", "loss", "gradient", "worst gradient", "norm", "ratio")


def _cells(layout: LayoutRun, name: str, found: Differences) -> list[str]:
    numbers = [found.logprobs, found.entropies, found.loss, found.gradient]
    tail = [found.norm, found.ratio]
    shorter = found.worst.replace("model.layers.", "").removesuffix(".weight")
    verdict = "pass" if found.passed else "FAIL"
    return [
        layout.text,
        str(layout.ranks),
        name,
        *(f"{n:.1e}" for n in numbers),
        shorter,
        *(f"{n:.1e}" for n in tail),
        verdict,
    ]


def with_model(run: Run, path: str) -> Run:
    """Return the run configuration with another model folder."""
    return run.model_copy(update={"model": run.model.model_copy(update={"path": path})})


def _select_layouts(
    loaded: Loaded[Run], run: Run, layouts: Sequence[str], max_ranks: int
) -> tuple[list[LayoutRun], dict[str, str]]:
    """Return the layouts that the model supports, and for the others the reason why not.

    Raises:
        ConfigError: a layout of ``layouts`` is not supported.
    """
    shape = model_sizes(family_of(read_hf_config(Path(run.model.path))))
    selected: list[LayoutRun] = []
    skipped: dict[str, str] = {}
    for layout in layout_runs(run, layouts or DEFAULT):
        parallel = layout_of(layout.run.parallel, layout.ranks, layout.run.model.megatron)
        changed = Loaded(layout.run, dict.fromkeys(loaded.origins, f"--layout {layout.text}"))
        problems = check_layout(changed, parallel, shape, on_gloo=not torch.cuda.is_available())
        if layouts and problems:
            raise ConfigError(f"--layout {layout.text}: " + "; ".join(problems))
        if layout.ranks > max_ranks and not layouts:
            problems = [f"needs {layout.ranks} ranks, more than --ranks {max_ranks}"]
        if problems:
            skipped[layout.text] = "; ".join(problems)
        else:
            selected.append(layout)
    return selected, skipped


def _with_objectives(run: Run, names: Sequence[str]) -> list[Run]:
    """Return the run configuration with each named objective and its default settings; without names, unchanged."""
    if not names:
        return [run]
    chosen = OBJECTIVES if "all" in names else names
    choices = [load(ObjectiveChoice, [], [f"objective.name={name}"]).run for name in chosen]
    return [run.model_copy(update={"objective": choice.objective}) for choice in choices]


def _run(layout: LayoutRun, objective_runs: Sequence[Run], case: Path, folder: Path) -> dict[str, Tensor]:
    """Run all ranks of a layout and return the results of the main rank."""
    folder.mkdir()
    (folder / CASE).symlink_to(case)
    runs = [
        layout.run.model_copy(update={"objective": each.objective}).model_dump(mode="json") for each in objective_runs
    ]
    (folder / RUNS).write_text(json.dumps({"runs": runs}), encoding="utf-8")
    run_forked(folder, layout.ranks, layout.text)
    return load_file(folder / RESULT)


def _add_old_logprobs(case: Path, scores: dict[str, Tensor]) -> None:
    """Add the log-probs of the reference, plus noise, as old log-probs: all layouts then use the same ratios."""
    batch = load_batch(case)
    scored = {"old_logprobs_T": scores["logprobs_T"], "old_entropies_T": scores["entropies_T"]}
    case.unlink()
    save_batch(batch.add(perturbed_logprobs(batch, scored)), case)
