"""What to write instead of a word that the command line does not know."""

import argparse
import difflib
from collections.abc import Collection, Sequence

REMOVED_VERBS = {
    "preflight": "the job script does this; `check --cluster` checks the nodes of an allocation",
    "fleet": "the job script does this; `check --cluster` checks the nodes of an allocation",
    "replay": "it is now `debug-nonfinite`",
    "replay-rank": "it is now `debug-nonfinite`",
}
"""Verbs of earlier versions -> what to use instead."""
MAX_SUGGESTED = 3
"""Settings that one message suggests."""


def instead_of_verb(word: str, verbs: Collection[str]) -> str:
    """Return the message about an unknown verb."""
    if word in REMOVED_VERBS:
        return f"no command {word!r}; {REMOVED_VERBS[word]}"
    if word.startswith("-"):
        return f"no option {word}; options follow a command: megatron-rl VERB {word}"
    if word.endswith((".toml", ".json")) or "=" in word:
        return f"no command {word!r}; write the command first: megatron-rl train {word}"
    close = difflib.get_close_matches(word, verbs, 1)
    return f"no command {word!r}; " + (f"did you mean `{close[0]}`?" if close else f"one of {', '.join(verbs)}")


def instead_of_options(
    unknown: Sequence[str], words: Sequence[str], parser: argparse.ArgumentParser, *, takes_settings: bool
) -> str:
    """Return the message about words that a parser does not know.

    Args:
        unknown: those words.
        words: all words of the command line.
        parser: the parser of the verb.
        takes_settings: whether the verb takes ``key=value`` settings.
    """
    options = [option for action in parser._actions for option in action.option_strings if option != "-h"]
    parts = []
    for word in unknown:
        if word.startswith("-"):
            parts.append(_instead_of_option(word, _value_of(word, words), options, takes_settings))
        elif not takes_settings:
            parts.append(f"no argument {word}: this command takes no more")
    return "; ".join(parts)


def _value_of(option: str, words: Sequence[str]) -> str:
    """Return the value that an unknown option seems to have: after ``=``, or the next word."""
    _, equals, value = option.partition("=")
    if equals:
        return value
    following = words[words.index(option) + 1 :][:1]
    is_value = following and not following[0].startswith("--") and "=" not in following[0]
    return following[0] if is_value and not following[0].endswith((".toml", ".json")) else "VALUE"


def _instead_of_option(word: str, value: str, options: Sequence[str], takes_settings: bool) -> str:
    name = word.partition("=")[0]
    if close := difflib.get_close_matches(name, options, 1, cutoff=0.75):
        return f"no option {name}; did you mean {close[0]}?"
    if settings := _settings_like(name.lstrip("-")) if takes_settings else []:
        hints = " or ".join(f"{setting}={value}" for setting in settings[:MAX_SUGGESTED])
        return f"no option {name}; settings have no dashes: write {hints}"
    return f"no option {name}" + ("; settings are written section.key=value" if takes_settings else "")


def _settings_like(name: str) -> list[str]:
    """Return the settings that a name without its dashes can mean, the likeliest first.

    An equal key or an equal last part of a key is preferred to a similar one.
    """
    from megatron_rl.config.schema import Run  # imports torch, which only this error waits for
    from megatron_rl.config.tree import all_fields

    asked = name.replace("-", "_").lower()
    keys = list(dict.fromkeys(".".join(key) for key, _, _ in all_fields(Run)))
    if exact := [key for key in keys if key == asked or key.endswith(f".{asked}")]:
        return exact
    lasts: dict[str, list[str]] = {}
    for key in keys:
        lasts.setdefault(key.rpartition(".")[2], []).append(key)
    close = difflib.get_close_matches(asked, keys, 1, cutoff=0.8) or difflib.get_close_matches(asked, lasts, 3, 0.8)
    return [key for found in close for key in lasts.get(found, [found])]
