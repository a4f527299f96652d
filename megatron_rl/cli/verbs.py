"""The verbs: their arguments, and the function that each one calls.

Modules are imported when a verb runs, so that ``--help`` does not wait for torch.
"""

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.config.saved_run import resuming
from megatron_rl.errors import ConfigError
from megatron_rl.util.logs import StderrHandler, logging_to

if TYPE_CHECKING:
    from megatron_rl.config.load import Loaded
    from megatron_rl.config.schema import Run

CONFIG_HELP = (
    "TOML files and settings such as train.steps=10; later files override earlier ones, settings override files; a "
    "relative path in a file is relative to the file's folder; a run folder stands for its settings and is resumed"
)

EVAL_HELP = (
    "run folders and checkpoints of any kind, whose newest weights are evaluated; without one, model.path of the "
    "config files. Settings are those of the run, overridden by the files, overridden by key=value"
)


@dataclass(frozen=True)
class Verb:
    """A command of ``megatron-rl``.

    Attributes:
        name: the word on the command line.
        group: heading of the overview.
        help: one line about it.
        examples: words that may follow it.
        add_arguments: adds its arguments to a parser.
        run: runs it and returns the exit code.
        rewrite: completes the words before they are parsed.
    """

    name: str
    group: str
    help: str
    examples: Sequence[str]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    rewrite: Callable[[Sequence[str]], Sequence[str]] = list


def _add_config(parser: argparse.ArgumentParser, nargs: str) -> None:
    parser.add_argument("config", nargs=nargs, metavar="CONFIG|RUN|KEY=VALUE", help=CONFIG_HELP)


def _load(words: Sequence[str]) -> "Loaded[Run]":
    from megatron_rl.config.schema import load_run

    return load_run(words)


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, "+")


def _train(options: argparse.Namespace) -> int:
    words = resuming(options.config)
    if sys.stderr.isatty() and "RANK" not in os.environ:  # importing torch takes seconds
        sys.stderr.write(f"megatron-rl train: checking {' '.join(word for word in words if '=' not in word)}\n")
    loaded = _load(words)
    from megatron_rl.launch.local import main as run_local

    return run_local(loaded, words)


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, "*")
    parser.add_argument("--ranks", type=int, help="number of trainer ranks (default: parallel.ranks)")
    parser.add_argument("--full", action="store_true", help="tokenize all prompts instead of a sample")
    parser.add_argument("--settings", action="store_true", help="also print all settings and software versions")
    parser.add_argument("--cluster", action="store_true", help="check the nodes of the surrounding Slurm allocation")


def _check(options: argparse.Namespace) -> int:
    from megatron_rl.launch.check import check

    words = resuming(options.config)
    loaded = _load(words) if words else None
    if options.cluster and loaded is not None:
        from megatron_rl.launch.slurm.cluster import check_cluster

        return check_cluster(words, loaded.run)
    return check(loaded, options.ranks, full=options.full, shows_settings=options.settings)


def _add_prove_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, "+")
    parser.add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="tensor=2,expert=2",
        help="a layout to compare, may be repeated (default: a fixed set)",
    )
    parser.add_argument("--shrink", metavar="layers=2,hidden=64", help="use a smaller model with random weights")
    parser.add_argument(
        "--objective", action="append", default=[], help="a name, file.py:Class, or all (default: the configured one)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the results")
    parser.add_argument("--ranks", type=int, default=4, help="maximum ranks per default layout (default: %(default)s)")


def _prove(options: argparse.Namespace) -> int:
    loaded = _load(resuming(options.config))
    from megatron_rl.prove.main import prove

    return prove(loaded, options.layout, options.shrink, options.objective, options.output, options.ranks)


def _add_slurm_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, "+")
    parser.add_argument("--submit", action="store_true", help="submit the script with sbatch")
    parser.add_argument(
        "--dry-run", action="store_true", help="write and print the script without submitting it (default)"
    )


def _slurm(options: argparse.Namespace) -> int:
    from megatron_rl.launch.slurm.render import slurm

    words = resuming(options.config)
    return slurm(_load(words), words, submit=options.submit and not options.dry_run)


def _add_debug_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="RUN/nonfinite/row.safetensors, in the folder of its weights")
    parser.add_argument("--same-layout", action="store_true", help="use the layout of the run instead of one rank")


def _debug_nonfinite(options: argparse.Namespace) -> int:
    from megatron_rl.launch.quiet import quiet_upstream

    quiet_upstream()
    from megatron_rl.launch.debug_nonfinite import debug_nonfinite

    with logging_to(StderrHandler("megatron-rl debug-nonfinite")):
        return debug_nonfinite(options.file, options.same_layout)


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folders", type=Path, nargs="+", metavar="RUN", help="run folder (log.path of a run)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="HTML page to write (default: report.html)")
    parser.add_argument("--serve", action="store_true", help="serve the page on this machine, updated while runs write")
    parser.add_argument("--port", type=int, default=8265, help="port of --serve; 0: a free one (default: %(default)s)")


def _report(options: argparse.Namespace) -> int:
    from megatron_rl.report.main import report, serve_report

    if options.serve and options.output:
        raise ConfigError("--serve writes no file; leave --output out, or --serve")
    if options.serve:
        return serve_report(options.run_folders, options.port)
    return report(options.run_folders, options.output)


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="*", metavar="CONFIG|FOLDER|KEY=VALUE", help=EVAL_HELP)
    parser.add_argument("--step", type=int, metavar="N", help="evaluate these weights of a run folder, not the newest")
    parser.add_argument("--output", type=Path, metavar="PATH", help="results folder; with --compare a JSON file")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="compare the results of two runs (or two results folders) with paired tests",
    )


def _evaluate(options: argparse.Namespace) -> int:
    if options.compare:
        if options.config:
            raise ConfigError(
                f"--compare takes two run or results folders and nothing else: leave {options.config[0]} out"
            )
        from megatron_rl.evaluate.compare import compare, find_result

        first, second = (find_result(folder, options.step) for folder in options.compare)
        return compare(first, second, options.output)
    from megatron_rl.config.load import split_words

    words, settings = split_words(options.config)
    if not words and not settings:
        raise ConfigError("nothing to evaluate; give a run folder, a checkpoint or a config file, or --compare A B")
    from megatron_rl.launch.quiet import quiet_upstream

    quiet_upstream()
    from megatron_rl.evaluate.main import evaluate

    return evaluate(words, settings, options.output, options.step)


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_rl.inference_server.serve import add_arguments

    add_arguments(parser)


def _serve(options: argparse.Namespace) -> int:
    from megatron_rl.inference_server.serve import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return serve(options)


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_rl.convert.arguments import add_arguments

    add_arguments(parser)


def _convert(options: argparse.Namespace) -> int:
    from megatron_rl.convert.main import convert

    return convert(options)


def _with_action(words: Sequence[str]) -> Sequence[str]:
    from megatron_rl.convert.arguments import with_action

    return with_action(words)


def _add_init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME", help="shipped config, as `megatron-rl configs` lists it")
    parser.add_argument("--folder", type=Path, default=Path("configs"), help="folder to copy to (default: %(default)s)")


def _init(options: argparse.Namespace) -> int:
    from megatron_rl.config.shipped import copy_configs

    files = copy_configs(options.names, options.folder)
    sys.stdout.write("".join(f"{file}\n" for file in files))
    sys.stdout.write(f"next: megatron-rl check {' '.join(map(str, files))}\n")
    return 0


def _configs(options: argparse.Namespace) -> int:
    from megatron_rl.config.shipped import shipped_configs, summary

    configs = shipped_configs()
    width = max(map(len, configs)) + 2
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000
    for name, file in configs.items():
        text = summary(file)
        cut = text if len(text) <= columns - width else f"{text[: columns - width - 4]} ..."
        sys.stdout.write(f"{name:<{width}}{cut}\n")
    sys.stdout.write("megatron-rl init NAME copies one with the files that it names\n")
    return 0


def _add_completion_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_rl.cli.completion import SHELLS

    parser.add_argument("shell", choices=SHELLS, help="shell that reads the script")


def _completion(options: argparse.Namespace) -> int:
    from megatron_rl.cli.command import all_parsers
    from megatron_rl.cli.completion import completion_script

    sys.stdout.write(completion_script(options.shell, all_parsers()))
    return 0


_START, _TRAIN, _LOOK, _WHY = "Start", "Train", "Use the results", "Find mistakes"
_ALL = (
    Verb(
        name="init",
        group=_START,
        help="copy a shipped config, such as demo, to configs/",
        examples=("demo", "models/qwen3-30b-a3b-1node objective/gspo"),
        add_arguments=_add_init_arguments,
        run=_init,
    ),
    Verb(
        name="configs",
        group=_START,
        help="list the shipped configs",
        examples=("",),
        add_arguments=lambda parser: None,
        run=_configs,
    ),
    Verb(
        name="completion",
        group=_START,
        help="print a script that completes commands and settings",
        examples=("bash > ~/.local/share/bash-completion/completions/megatron-rl", "zsh > ~/.megatron-rl.zsh"),
        add_arguments=_add_completion_arguments,
        run=_completion,
    ),
    Verb(
        name="train",
        group=_TRAIN,
        help="train a model, or continue the run of a folder",
        examples=("my.toml", "my.toml objective.name=gspo log.path=runs/gspo", "runs/gspo train.steps=200"),
        add_arguments=_add_train_arguments,
        run=_train,
    ),
    Verb(
        name="check",
        group=_TRAIN,
        help="validate a configuration and print its plan; starts nothing",
        examples=("my.toml", "my.toml parallel.tensor=2 --ranks 16"),
        add_arguments=_add_check_arguments,
        run=_check,
    ),
    Verb(
        name="slurm",
        group=_TRAIN,
        help="write the Slurm script of a run, and optionally submit it",
        examples=("my.toml slurm.nodes=2 slurm.rollout_nodes=1 --submit",),
        add_arguments=_add_slurm_arguments,
        run=_slurm,
    ),
    Verb(
        name="report",
        group=_LOOK,
        help="write an HTML page about runs, or serve one that follows them",
        examples=("runs/gspo", "runs/gspo runs/espo --output compare.html", "runs/gspo --serve"),
        add_arguments=_add_report_arguments,
        run=_report,
    ),
    Verb(
        name="eval",
        group=_LOOK,
        help="measure pass@k of checkpoints on held-out prompts",
        examples=("runs/gspo evaluate.samples=8", "runs/gspo --step 40", "--compare runs/gspo runs/espo"),
        add_arguments=_add_eval_arguments,
        run=_evaluate,
    ),
    Verb(
        name="convert",
        group=_LOOK,
        help="write checkpoints in another format, or compare two",
        examples=("runs/gspo model --step 40", "hf-to-megatron Qwen3-30B-A3B dist", "verify Qwen3-30B-A3B dist"),
        add_arguments=_add_convert_arguments,
        run=_convert,
        rewrite=_with_action,
    ),
    Verb(
        name="serve",
        group=_LOOK,
        help="run the embedded inference server",
        examples=("Qwen3-30B-A3B --port 30000", "runs/gspo --step 40"),
        add_arguments=_add_serve_arguments,
        run=_serve,
    ),
    Verb(
        name="prove",
        group=_WHY,
        help="compare parallel layouts with one rank, every gradient",
        examples=("my.toml --shrink layers=4 --layout tensor=2,expert=2",),
        add_arguments=_add_prove_arguments,
        run=_prove,
    ),
    Verb(
        name="debug-nonfinite",
        group=_WHY,
        help="find the first NaN or inf of a saved micro-batch",
        examples=("runs/gspo/nonfinite/row.safetensors",),
        add_arguments=_add_debug_arguments,
        run=_debug_nonfinite,
    ),
)
VERBS: Mapping[str, Verb] = {verb.name: verb for verb in _ALL}
"""All verbs by name, in the order of the overview."""
