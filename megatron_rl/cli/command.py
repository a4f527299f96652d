"""Parses the command line, runs a verb, and turns errors into exit codes."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_rl.cli.hints import instead_of_options, instead_of_verb
from megatron_rl.cli.overview import overview
from megatron_rl.cli.verbs import VERBS, Verb
from megatron_rl.util.exit_codes import USER_ERROR, interrupt_on_sigterm, run_command

PROGRAM = "megatron-rl"
HELP_WORDS = ("-h", "--help", "help")


class VerbParser(argparse.ArgumentParser):
    """A parser whose errors are a message and the command for help, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 after one message."""
        self.exit(USER_ERROR, f"{self.prog}: {message}; all arguments: {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code; a user error is one message and code 2."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["help"] and len(words) > 1:
        words = [words[1], "--help"]
    if not words or words[0] in HELP_WORDS:
        sys.stdout.write(overview(VERBS))
        return 0
    if words[0] == "--version":
        from megatron_rl import __version__

        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        return 0
    if words[0] not in VERBS:
        sys.stderr.write(f"{PROGRAM}: {instead_of_verb(words[0], list(VERBS))}\n")
        return USER_ERROR
    return _run(VERBS[words[0]], words[1:])


def all_parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of every verb, by name."""
    return {name: make_parser(verb) for name, verb in VERBS.items()}


def _run(verb: Verb, words: Sequence[str]) -> int:
    options = parse(verb, words)
    if "RANK" not in os.environ:  # a rank that is still starting just ends
        interrupt_on_sigterm()
    return run_command(f"{PROGRAM} {verb.name}", lambda: verb.run(options))


def parse(verb: Verb, words: Sequence[str]) -> argparse.Namespace:
    """Return the options of a verb; unlike in plain argparse, settings may also follow options."""
    parser = make_parser(verb)
    words = verb.rewrite(words)
    options, rest = parser.parse_known_args(words)
    unknown = [word for word in rest if word.startswith("-") or "config" not in options]
    if unknown:
        hint = instead_of_options(rest, words, parser, takes_settings="config" in options)
        parser.exit(USER_ERROR, f"{parser.prog}: {hint}\n")
    if rest:
        options.config = [*options.config, *rest]
    return options


def make_parser(verb: Verb) -> argparse.ArgumentParser:
    """Return the parser of a verb."""
    description = f"{verb.help[0].upper()}{verb.help[1:]}."
    parser = VerbParser(
        prog=f"{PROGRAM} {verb.name}",
        description=description,
        epilog="\n".join(["examples:", *(f"  {PROGRAM} {verb.name} {example}".rstrip() for example in verb.examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.add_arguments(parser)
    return parser
