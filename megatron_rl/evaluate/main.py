"""``megatron-rl eval``: samples responses to held-out prompts, writes every sample, and prints metrics."""

import json
from collections.abc import Sequence
from concurrent.futures import as_completed
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from megatron_rl.data.types import Prompt
from megatron_rl.evaluate.metrics import METHOD, all_metrics
from megatron_rl.evaluate.result_folder import RESULT, SAMPLES, ResultFolder, describe_evaluation
from megatron_rl.evaluate.servers import VERSION, serving
from megatron_rl.evaluate.tables import notes, table
from megatron_rl.evaluate.targets import Target, find_targets
from megatron_rl.launch.planning.run_plan import check_sampling
from megatron_rl.models.tokenizers import open_tokenizer, with_stop_tokens
from megatron_rl.rollout.evaluation import evaluation_request, heldout_prompts
from megatron_rl.rollout.routes import requested_routes
from megatron_rl.rollout.stream import verify_groups
from megatron_rl.tasks import make_task
from megatron_rl.tasks.open_verifier import open_verifier
from megatron_rl.util.atomic import replace_text
from megatron_rl.util.console import make_console


def evaluate(words: Sequence[str], settings: Sequence[str], output: Path | None = None, step: int | None = None) -> int:
    """Evaluate all targets of the command line, one after the other; return 0.

    Args:
        words: configuration files and folders.
        settings: ``key=value`` arguments.
        output: folder of the results.
        step: which weights of run folders to evaluate; None: the newest.

    Raises:
        ConfigError, DataError: an evaluation cannot run; raised before any server starts.
    """
    console = make_console()
    targets = find_targets(words, settings, output, step)
    for target in targets:
        check_sampling(target.loaded)
    for target in targets:
        evaluate_one(target, console)
    return 0


def evaluate_one(target: Target, console: Console) -> None:
    """Sample the missing responses, write the metrics and print them."""
    run = target.run
    tokenizer = open_tokenizer(Path(run.model.path), trust_code=run.model.trust_code)
    task = make_task(run.task, tokenizer)
    prompts = heldout_prompts(run, task)
    description = describe_evaluation(run, target.step, prompts)
    folder = ResultFolder(target.output, description, prompts)
    missing = folder.missing()
    if missing:
        finished = f" ({len(prompts) - len(missing)} answered before)" if len(missing) < len(prompts) else ""
        samples = "1 sample" if run.evaluate.samples == 1 else f"{run.evaluate.samples} samples"
        console.print(
            f"{run.model.path}: {len(prompts)} prompts{finished}, {samples} per prompt, temperature"
            f" {run.evaluate.temperature:g}",
            markup=False,
        )
        try:
            _sample(target, prompts, folder, tokenizer, console)
        except BaseException:
            left = len(folder.missing())
            console.print(f"{len(prompts) - left} of {len(prompts)} prompts are in {target.output}", markup=False)
            console.print("run the same command again to continue")
            raise
    metrics = all_metrics(folder.finish())
    result = {"asked": description, "method": METHOD, "figures": [row.record() for row in metrics]}
    replace_text(target.output / RESULT, json.dumps(result, indent=2) + "\n")
    console.print(table(metrics))
    for line in notes(metrics):
        console.print(line, markup=False)
    console.print(f"{target.output}: {RESULT}, {SAMPLES}", markup=False)


def _sample(
    target: Target,
    prompts: tuple[Prompt, ...],
    folder: ResultFolder,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> None:
    """Sample and verify the missing responses, and write them as they arrive."""
    run, missing = with_stop_tokens(target.run, tokenizer), folder.missing()
    with (
        serving(run, tokenizer, target.output) as fleet,
        closing(open_verifier(run)) as verifier,
        Progress(console=console, transient=True) as progress,
    ):
        bar = progress.add_task("prompts", total=len(prompts), completed=len(prompts) - len(missing))
        versions = range(VERSION, VERSION + 1)
        requests = fleet.submit(
            *evaluation_request(run, prompts, target.step), versions, indices=missing, routes=requested_routes(run)
        )
        first_index = {verify_groups(pending, verifier): first for first, pending in requests}
        try:
            for future in as_completed(first_index):
                for index, (group, verdicts) in enumerate(future.result(), start=first_index[future]):
                    if index in missing:
                        folder.add(group, verdicts, run.task.name)
                        progress.advance(bar)
        finally:
            for _, pending in requests:
                pending.cancel()
