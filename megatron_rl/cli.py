"""The command line: ``megatron-rl VERB``."""

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.errors import ConfigError
from megatron_rl.inference_server.serve import add_arguments as add_serve_arguments
from megatron_rl.inference_server.serve import serve
from megatron_rl.util.exit_codes import interrupt_on_sigterm, run_command
from megatron_rl.util.logs import StderrHandler, logging_to

if TYPE_CHECKING:  # the schema imports torch, which --help need not wait for
    from megatron_rl.config.load import Loaded
    from megatron_rl.config.schema import Run

CONFIG_HELP = (
    "TOML files and settings such as train.steps=10; later files override earlier ones, settings override files; a "
    "relative path in a file is relative to the file's folder"
)

EVAL_HELP = (
    "run folders and checkpoints of any kind, whose newest weights are evaluated; without one, model.path of the "
    "config files. Settings are those of the run, overridden by the files, overridden by key=value"
)


REMOVED_VERBS = {
    "preflight": "the job script does this; `check --cluster` checks the nodes of an allocation",
    "fleet": "the job script does this; `check --cluster` checks the nodes of an allocation",
    "replay": "it is now `debug-nonfinite`",
    "replay-rank": "it is now `debug-nonfinite`",
}
"""Verbs of earlier versions -> what to use instead."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code; a user error is one message and code 2."""
    options = _parse(argv)
    if "RANK" not in os.environ:  # a rank that is still starting just ends
        interrupt_on_sigterm()
    return run_command(f"megatron-rl {options.verb}", lambda: options.run(options))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; unlike in plain argparse, settings may also follow options."""
    parser, verbs = _parser()
    words = sys.argv[1:] if argv is None else list(argv)
    if words and not words[0].startswith("-") and words[0] not in verbs:
        parser.error(f"no command {words[0]!r}; {_instead_of(words[0], verbs)}")
    options, rest = parser.parse_known_args(words)
    unknown = [word for word in rest if word.startswith("-") or "config" not in options]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.config = [*options.config, *rest]
    return options


def _instead_of(verb: str, verbs: Collection[str]) -> str:
    """Return what to write instead of an unknown verb."""
    if verb in REMOVED_VERBS:
        return REMOVED_VERBS[verb]
    close = difflib.get_close_matches(verb, verbs, 1)
    return f"did you mean `{close[0]}`?" if close else f"one of {', '.join(verbs)}"


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser, and the parser of each verb."""
    parser = argparse.ArgumentParser(prog="megatron-rl", description="RL post-training for mixture-of-experts models.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=help)
        verb.set_defaults(run=run)
        return verb

    _add_config(add("train", _train, "train a model"), "+")
    _add_check_arguments(add("check", _check, "validate a configuration and print its plan; starts nothing"))
    _add_prove_arguments(add("prove", _prove, "compare loss and gradient of parallel layouts with those of one rank"))
    _add_slurm_arguments(add("slurm", _slurm, "write the Slurm script of a run, and optionally submit it"))
    _add_debug_arguments(add("debug-nonfinite", _debug_nonfinite, "find the first NaN or inf of a saved micro-batch"))
    _add_report_arguments(add("report", _report, "write an HTML page about one or more runs"))
    _add_eval_arguments(add("eval", _evaluate, "measure pass@k of checkpoints on held-out prompts"))
    add_serve_arguments(add("serve", _serve, "run the embedded inference server"))
    return parser, verbs.choices


def _add_config(parser: argparse.ArgumentParser, nargs: str) -> None:
    parser.add_argument("config", nargs=nargs, metavar="CONFIG|KEY=VALUE", help=CONFIG_HELP)


def _load(words: Sequence[str]) -> "Loaded[Run]":
    from megatron_rl.config.schema import load_run

    return load_run(words)


def _train(options: argparse.Namespace) -> int:
    loaded = _load(options.config)
    from megatron_rl.launch.local import main as run_local

    return run_local(loaded, options.config)


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, "*")
    parser.add_argument("--ranks", type=int, help="number of trainer ranks (default: parallel.ranks)")
    parser.add_argument("--full", action="store_true", help="tokenize all prompts instead of a sample")
    parser.add_argument("--settings", action="store_true", help="also print all settings and software versions")
    parser.add_argument("--cluster", action="store_true", help="check the nodes of the surrounding Slurm allocation")


def _check(options: argparse.Namespace) -> int:
    from megatron_rl.launch.check import check

    loaded = _load(options.config) if options.config else None
    if options.cluster and loaded is not None:
        from megatron_rl.launch.slurm.cluster import check_cluster

        return check_cluster(options.config, loaded.run)
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
    loaded = _load(options.config)
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

    return slurm(_load(options.config), options.config, submit=options.submit and not options.dry_run)


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


def _report(options: argparse.Namespace) -> int:
    from megatron_rl.report.main import report

    return report(options.run_folders, options.output)


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="*", metavar="CONFIG|FOLDER|KEY=VALUE", help=EVAL_HELP)
    parser.add_argument("--output", type=Path, metavar="PATH", help="results folder; with --compare a JSON file")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="compare two results folders with paired tests"
    )


def _evaluate(options: argparse.Namespace) -> int:
    if options.compare:
        if options.config:
            raise ConfigError(f"--compare takes two results folders and nothing else: leave {options.config[0]} out")
        from megatron_rl.evaluate.compare import compare

        first, second = options.compare
        return compare(first, second, options.output)
    from megatron_rl.config.load import split_words

    words, settings = split_words(options.config)
    if not words and not settings:
        raise ConfigError("nothing to evaluate; give a run folder, a checkpoint or a config file, or --compare A B")
    from megatron_rl.launch.quiet import quiet_upstream

    quiet_upstream()
    from megatron_rl.evaluate.main import evaluate

    return evaluate(words, settings, options.output)


def _serve(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return serve(options)


if __name__ == "__main__":
    sys.exit(main())
