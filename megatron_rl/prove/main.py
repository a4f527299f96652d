"""``megatron-rl prove``: one real training step under many layouts, each compared with one rank in float64."""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.algorithms.objectives import AnyObjective
from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.data.files import load_batch, save_batch
from megatron_rl.errors import ConfigError
from megatron_rl.launch.planning.layout import check_layout, layout_of
from megatron_rl.launch.planning.model_sizes import model_sizes
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.prove.case import CASE, RESULT, RUNS, SizeOverrides, make_batch, make_model, moved_scores
from megatron_rl.prove.compare import TOLERANCES, Differences, differences
from megatron_rl.prove.layouts import DEFAULT, LayoutRun, layout_runs, reference
from megatron_rl.prove.ranks import run_forked

ALL_OBJECTIVES = tuple(str(kind.model_fields["name"].default) for kind in get_args(AnyObjective))


def prove(
    loaded: Loaded[Run],
    layouts: Sequence[str],
    shrink: str | None = None,
    objectives: Sequence[str] = (),
    output: Path | None = None,
    most_ranks: int = 4,
) -> int:
    """Print the table; return 0 if every difference is rounding, else 1.

    Args:
        loaded: the configuration whose model, precision and objective are proven.
        layouts: such as ``tensor=2,expert=2``; none: the default set, as far as the model divides.
        shrink: sizes of a smaller model with random weights, such as ``layers=2,hidden=64``.
        objectives: names; none: the configuration's own.
        output: where ``prove.json`` goes.
        most_ranks: of a layout of the default set.
    """
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=150)
    with tempfile.TemporaryDirectory(prefix="megatron-rl-prove-") as place:
        folder = Path(place)
        model = make_model(loaded.run, None if shrink is None else SizeOverrides.parse(shrink), folder / "model")
        run = with_model(loaded.run, model)
        family = family_of(read_hf_config(Path(model)))
        trials, skipped = _possible(loaded, run, layouts, most_ranks)
        case = folder / CASE
        save_batch(make_batch(family.vocab_size, seed=run.train.seed), case)
        runs_of = _objectives(run, objectives)
        names = [each.objective.name for each in runs_of]
        console.print(f"reference: one rank, float64; {family.num_layers} layers, {', '.join(names)}")
        truth = _run(reference(run), runs_of, case, folder / "reference")
        _use_scores(case, truth)
        table = Table("layout", "ranks", "objective", *HEADS, "verdict")
        records: list[dict[str, object]] = []
        for number, trial in enumerate(trials):
            began = time.perf_counter()
            results = _run(trial, runs_of, case, folder / f"layout_{number}")
            tolerance = TOLERANCES[trial.run.model.dtype]
            for name in names:
                found = differences(results, truth, name, tolerance)
                records.append({"layout": trial.text, "ranks": trial.ranks, "objective": name} | found.record())
                table.add_row(*_cells(trial, name, found))
            failed = [r for r in records if r["layout"] == trial.text and not r["holds"]]
            verdict = "ok" if not failed else "FAILS: " + "; ".join(str(r["reasons"]) for r in failed)
            console.print(f"  {trial.text}: {verdict} ({time.perf_counter() - began:.0f} s)", markup=False)
    console.print(table)
    for text, why in skipped.items():
        console.print(f"not tried: {text}: {why}", markup=False, style="dim")
    bad = [record for record in records if not record["holds"]]
    console.print(f"{len(records) - len(bad)} of {len(records)} hold within the tolerance of {run.model.dtype}")
    if output is not None:
        described = {"dtype": run.model.dtype, "tolerance": vars(TOLERANCES[run.model.dtype]), "results": records}
        output.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return 1 if bad else 0


HEADS = ("log-prob", "entropy", "loss", "gradient", "worst gradient", "norm", "ratio")


def _cells(trial: LayoutRun, name: str, found: Differences) -> list[str]:
    numbers = [found.logprobs, found.entropies, found.loss, found.gradient]
    tail = [found.norm, found.ratio]
    shorter = found.worst.replace("model.layers.", "").removesuffix(".weight")
    verdict = "holds" if found.holds else "FAILS"
    return [
        trial.text,
        str(trial.ranks),
        name,
        *(f"{n:.1e}" for n in numbers),
        shorter,
        *(f"{n:.1e}" for n in tail),
        verdict,
    ]


def with_model(run: Run, path: str) -> Run:
    """Return the run with another model folder."""
    return run.model_copy(update={"model": run.model.model_copy(update={"path": path})})


def _possible(
    loaded: Loaded[Run], run: Run, layouts: Sequence[str], most_ranks: int
) -> tuple[list[LayoutRun], dict[str, str]]:
    """Return the layouts that the model divides, and why not for the others; a user's own must all be possible."""
    shape = model_sizes(family_of(read_hf_config(Path(run.model.path))))
    possible: list[LayoutRun] = []
    skipped: dict[str, str] = {}
    for trial in layout_runs(run, layouts or DEFAULT):
        layout = layout_of(trial.run.parallel, trial.ranks, trial.run.model.megatron)
        changed = Loaded(trial.run, dict.fromkeys(loaded.origins, f"--layout {trial.text}"))
        problems = check_layout(changed, layout, shape, on_gloo=not torch.cuda.is_available())
        if layouts and problems:
            raise ConfigError(f"--layout {trial.text}: " + "; ".join(problems))
        if trial.ranks > most_ranks and not layouts:
            problems = [f"needs {trial.ranks} ranks, more than --ranks {most_ranks}"]
        if problems:
            skipped[trial.text] = "; ".join(problems)
        else:
            possible.append(trial)
    return possible, skipped


def _objectives(run: Run, names: Sequence[str]) -> list[Run]:
    """Return the run with each objective; the ones that are not its own get defaults, wide enough to clip only some."""
    if not names:
        return [run]
    chosen = ALL_OBJECTIVES if "all" in names else names
    if unknown := [name for name in chosen if name not in ALL_OBJECTIVES]:
        raise ConfigError(f"--objective {', '.join(unknown)} is none of {', '.join(ALL_OBJECTIVES)}")
    adapter: TypeAdapter[AnyObjective] = TypeAdapter(AnyObjective)
    return [run.model_copy(update={"objective": adapter.validate_python({"name": name})}) for name in chosen]


def _run(trial: LayoutRun, runs_of: Sequence[Run], case: Path, folder: Path) -> dict[str, Tensor]:
    """Run all ranks of a layout and return what the main rank wrote."""
    folder.mkdir()
    (folder / CASE).symlink_to(case)
    runs = [trial.run.model_copy(update={"objective": each.objective}).model_dump(mode="json") for each in runs_of]
    (folder / RUNS).write_text(json.dumps({"runs": runs}), encoding="utf-8")
    run_forked(folder, trial.ranks, trial.text)
    return load_file(folder / RESULT)


def _use_scores(case: Path, truth: dict[str, Tensor]) -> None:
    """Give every layout the reference's scores as the old policy's, so that all form the same ratios and segments."""
    batch = load_batch(case)
    scored = {"old_logprobs_T": truth["logprobs_T"], "old_entropies_T": truth["entropies_T"]}
    case.unlink()
    save_batch(batch.add(moved_scores(batch, scored)), case)
