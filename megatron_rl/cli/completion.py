"""A script that completes commands, options, settings and files in bash and zsh."""

import argparse
from collections.abc import Mapping

SHELLS = ("bash", "zsh")

_SCRIPT = """\
# Completion of megatron-rl, written by: megatron-rl completion {shell}
{start}_megatron_rl() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" words="" path
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{verbs} help --help --version" -- "$current"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    while IFS= read -r path; do
        if [ -d "$path" ]; then COMPREPLY+=("$path/"); else COMPREPLY+=("$path"); fi
    done < <(compgen -f -- "$current")
    case "${{COMPREPLY[0]:-}}" in
        *= | */) compopt -o nospace 2>/dev/null ;;
    esac
}}
_megatron_rl_settings="{settings}"
complete -F _megatron_rl megatron-rl
"""
_ZSH = "autoload -U +X compinit && compinit -C\nautoload -U +X bashcompinit && bashcompinit\n"


def completion_script(shell: str, parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return the script for a shell.

    Args:
        shell: one of ``SHELLS``.
        parsers: parser of each verb.
    """
    from megatron_rl.config.schema import Run  # imports torch, which only this verb waits for
    from megatron_rl.config.tree import all_fields

    keys = dict.fromkeys(".".join(key) for key, _, _ in all_fields(Run))
    names = [f"objective.name={name}" for name in _objectives()]
    cases = [f'        {verb}) words="{" ".join(_words(parser))}" ;;' for verb, parser in parsers.items()]
    cases.append(f'        help) words="{" ".join(parsers)}" ;;')
    return _SCRIPT.format(
        shell=shell,
        start=_ZSH if shell == "zsh" else "",
        verbs=" ".join(parsers),
        cases="\n".join(cases),
        settings=" ".join([*(f"{key}=" for key in keys if key != "objective.name"), *names]),
    )


def _objectives() -> list[str]:
    from megatron_rl.config.schema import Run
    from megatron_rl.config.tree import members

    return list(members(Run.model_fields["objective"]))


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """Return what may follow a verb: its options, its actions, and the variable of settings."""
    words = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for action in parser._actions:
        words += [str(choice) for choice in action.choices or ()] if not action.option_strings else []
    takes_settings = any(action.dest == "config" for action in parser._actions)
    return [*words, *(["$_megatron_rl_settings"] if takes_settings else [])]
