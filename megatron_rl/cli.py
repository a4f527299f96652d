"""The command line: ``megatron-rl VERB``. The only place, with the console, that prints."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megatron_rl.config.load import Loaded, load
from megatron_rl.errors import ConfigError, MegatronRLError
from megatron_rl.inference_server.serve import add_arguments as add_serve_arguments
from megatron_rl.inference_server.serve import serve

if TYPE_CHECKING:  # the tree needs torch, and help should not wait for it
    from megatron_rl.config.schema import Run

CONFIG_HELP = (
    "TOML files, later ones stronger, and settings such as train.steps=10, stronger than any file; "
    "a relative path in a file begins at that file's folder"
)

EVAL_HELP = (
    "run folders and checkpoints of any kind, whose newest weights are evaluated; without one, the model.path of the "
    "config files. Settings are those of the run, then of the files, then key=value"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; return its exit code. An error that a user can meet is one message, and code 2 (``check``: 1)."""
    options = _parse(argv)
    if "RANK" not in os.environ:  # a rank that is still starting just ends
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(options.run(options))
    except MegatronRLError as error:
        sys.stderr.write(f"megatron-rl {options.verb}: {error}\n")
        return 1 if options.verb == "check" else 2
    except KeyboardInterrupt:
        sys.stderr.write(f"megatron-rl {options.verb}: interrupted\n")
        return 130


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; settings may also stand after options, where argparse itself takes none."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or "config" not in options]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.config = [*options.config, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-rl", description="RL post-training for mixture-of-experts models.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser("train", help="run a training job from configs")
    train.add_argument("config", nargs="+", metavar="CONFIG|KEY=VALUE", help=CONFIG_HELP)
    train.set_defaults(run=_train)

    check = verbs.add_parser("check", help="validate configs and print layout, batches and versions; starts nothing")
    check.add_argument("config", nargs="*", metavar="CONFIG|KEY=VALUE", help=CONFIG_HELP)
    check.add_argument("--ranks", type=int, help="trainer ranks of the real run (default: parallel.ranks)")
    check.add_argument("--cluster", action="store_true", help="look at the nodes of the allocation this runs in")
    check.set_defaults(run=_check)

    prove = verbs.add_parser("prove", help="show that any layout gives one rank's loss and gradient")
    prove.add_argument("config", nargs="+", metavar="CONFIG|KEY=VALUE", help=CONFIG_HELP)
    prove.add_argument("--layout", action="append", default=[], metavar="tensor=2,expert=2", help="default: a set")
    prove.add_argument("--shrink", metavar="layers=2,hidden=64", help="a smaller model of the family, random weights")
    prove.add_argument("--objective", action="append", default=[], help="a name or all; default: the config's own")
    prove.add_argument("--output", type=Path, metavar="FILE", help="write prove.json here")
    prove.add_argument("--ranks", type=int, default=4, help="most ranks of a layout of the set (default: %(default)s)")
    prove.set_defaults(run=_prove)

    slurm = verbs.add_parser("slurm", help="write the Slurm script of a run, and submit it if asked")
    slurm.add_argument("config", nargs="+", metavar="CONFIG|KEY=VALUE", help=CONFIG_HELP)
    slurm.add_argument("--submit", action="store_true", help="hand the script to sbatch")
    slurm.add_argument("--dry-run", action="store_true", help="only print it, which is the default")
    slurm.set_defaults(run=_slurm)

    fleet = verbs.add_parser("fleet", help="run one server of a config's fleet, as a step of a Slurm job does")
    fleet.add_argument("config", nargs="+", metavar="CONFIG|KEY=VALUE", help=CONFIG_HELP)
    fleet.add_argument("--registry", type=Path, required=True, metavar="FOLDER", help="where its address is written")
    fleet.add_argument("--host", help="address to listen on (default: this node's, as the job's script knows it)")
    fleet.set_defaults(run=_fleet)

    preflight = verbs.add_parser("preflight", help="the first steps of a Slurm job: are the nodes fit for it")
    preflight.add_argument("step", choices=("report", "judge", "link", "fleet"))
    preflight.add_argument("config", nargs="*", metavar="CONFIG|KEY=VALUE", help=CONFIG_HELP)
    preflight.add_argument("--folder", type=Path, help="where nodes write and read; fleet: where addresses go")
    preflight.add_argument("--nodes", nargs="+", default=[], help="judge: names of the nodes")
    preflight.add_argument("--needed", type=int, default=1, help="judge: how many of them the run needs")
    preflight.set_defaults(run=_preflight)

    replay = verbs.add_parser("replay", help="run a saved micro-batch alone and find its first NaN or inf")
    replay.add_argument("file", type=Path, help="RUN/nonfinite/row.safetensors, beside the weights that it was run on")
    replay.add_argument("--same-layout", action="store_true", help="on the ranks of the run, instead of one")
    replay.set_defaults(run=_replay)
    replay_rank = verbs.add_parser("replay-rank")
    replay_rank.add_argument("file", type=Path)
    replay_rank.add_argument("folder", type=Path)
    replay_rank.set_defaults(run=_replay_rank)

    _add_report(verbs)
    evaluate = verbs.add_parser("eval", help="pass@k of checkpoints on held-out prompts, and two results compared")
    _add_eval_arguments(evaluate)

    serve = verbs.add_parser("serve", help="run the embedded rollout server alone")
    add_serve_arguments(serve)
    serve.set_defaults(run=_serve)
    return parser


def _add_report(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    report = verbs.add_parser("report", help="show runs: one HTML page with curves, tokens and segments, or plots")
    report.add_argument("run_folders", type=Path, nargs="+", metavar="RUN", help="a run folder (log.path of a run)")
    report.add_argument("--output", type=Path, metavar="FILE", help="where the page goes (default: report.html)")
    report.add_argument("--png", type=Path, metavar="FOLDER", help="write the plots alone, as PNG")
    report.set_defaults(run=_report)


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="*", metavar="CONFIG|FOLDER|KEY=VALUE", help=EVAL_HELP)
    parser.add_argument("--output", type=Path, metavar="PATH", help="folder of results; with --compare a JSON file")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="folders of results: paired tests")
    parser.set_defaults(run=_evaluate)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return config files and ``key=value`` words apart; a word is a setting if it has ``=`` and is no file."""
    settings = [word for word in words if "=" in word and not Path(word).is_file()]
    return [word for word in words if word not in settings], settings


def _load(words: Sequence[str]) -> "Loaded[Run]":
    from megatron_rl.config.schema import Run

    return load(Run, *split_words(words))


def _train(options: argparse.Namespace) -> int:
    loaded = _load(options.config)
    from megatron_rl.launch.local import main as run_local

    return run_local(loaded, options.config)


def _check(options: argparse.Namespace) -> int:
    from megatron_rl.launch.check import check

    loaded = _load(options.config) if options.config else None
    if options.cluster and loaded is not None:
        from megatron_rl.launch.slurm.cluster import check_cluster

        return check_cluster(options.config, loaded.run)
    return check(loaded, options.ranks)


def _prove(options: argparse.Namespace) -> int:
    loaded = _load(options.config)
    from megatron_rl.prove.main import prove

    return prove(loaded, options.layout, options.shrink, options.objective, options.output, options.ranks)


def _slurm(options: argparse.Namespace) -> int:
    from megatron_rl.launch.slurm.render import slurm

    return slurm(_load(options.config), options.config, submit=options.submit and not options.dry_run)


def _fleet(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    loaded = _load(options.config)
    from megatron_rl.launch.slurm.serve_node import keep_server

    return keep_server(loaded.run, options.registry, options.host)


def _preflight(options: argparse.Namespace) -> int:
    from megatron_rl.launch.slurm import preflight

    if options.step == "fleet":
        from megatron_rl.launch.slurm.round_trip import ask_fleet

        return ask_fleet(_load(options.config).run, options.folder)
    if options.folder is None:
        raise ConfigError(f"preflight {options.step} needs --folder")
    if options.step == "judge":
        return preflight.judge(options.folder, options.nodes, options.needed)
    if options.step == "link":
        return preflight.link(options.folder, timeout_seconds=60)
    return preflight.report(_load(options.config).run, options.folder)


def _replay(options: argparse.Namespace) -> int:
    from megatron_rl.launch.quiet import quiet_upstream

    quiet_upstream()
    from megatron_rl.launch.debug_nonfinite import replay

    return replay(options.file, options.same_layout)


def _replay_rank(options: argparse.Namespace) -> int:
    from megatron_rl.launch.failures import reporting_failure
    from megatron_rl.launch.quiet import quiet_upstream

    quiet_upstream()
    with reporting_failure():
        from megatron_rl.train.nonfinite_dump import replay_rank

        return replay_rank(options.file, options.folder)


def _report(options: argparse.Namespace) -> int:
    from megatron_rl.report.main import report

    return report(options.run_folders, options.output, options.png)


def _evaluate(options: argparse.Namespace) -> int:
    if options.compare:
        if options.config:
            raise ConfigError(f"--compare takes two folders of results and nothing else: leave {options.config[0]} out")
        from megatron_rl.evaluate.compare import compare

        first, second = options.compare
        return compare(first, second, options.output)
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
