"""Servers of the real SGLang, in an environment of their own: its interpreter is named, nothing of it is imported."""

import difflib
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from megatron_rl.errors import ConfigError
from megatron_rl.fleet.process import ServerProcess, require_model
from megatron_rl.util.ports import free_port

Options = Mapping[str, bool | int | float | str]
OURS: Mapping[str, str] = {
    "model_path": "model.path",
    "model": "model.path",
    "host": "this run: its own servers listen on this machine only",
    "port": "this run: every server has a free port",
    "weight_version": "this run: every push names its version",
}
"""Options of SGLang that are decided elsewhere, and where."""
NEVER_TIED = frozenset({"glm4_moe", "mixtral", "qwen2_moe", "qwen3_moe"})
"""Values of ``model_type`` whose output head SGLang 0.5.23 never ties to the embedding, whatever config.json says."""
_HELP_SECONDS = 180
_GRACE_SECONDS = 30.0
"""It looks for its end every 5 s, then gives memory back; on a GPU a kill would leave that behind."""
_NOT_THEIRS = re.compile(r"PYTHON(PATH|HOME)|VIRTUAL_ENV|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)")
"""Variables of this process's own interpreter and ranks."""


def sglang_server(
    python: str,
    model_path: str,
    log_path: Path,
    options: Options,
    environment: Mapping[str, str],
    host: str = "127.0.0.1",
) -> ServerProcess:
    """Return an SGLang server, not started yet.

    Args:
        python: interpreter of the environment that SGLang is installed in.
        model_path: folder of a Hugging Face checkpoint, whose weights are version 0.
        log_path: takes its output.
        options: by name with underscores; ``True`` is a flag alone.
        environment: variables besides this process's.
        host: address to listen on.
    """
    require_model(model_path)
    port = free_port(host)
    given: Options = {"model_path": model_path, "host": host, "port": port, "weight_version": "0", **options}
    command = [python, "-m", "sglang.launch_server", *arguments(given)]
    return ServerProcess(command, host, port, log_path, own_environment(environment), _GRACE_SECONDS)


def arguments(options: Options) -> list[str]:
    """Return the options as a command line has them; one that is ``False`` is left out."""
    words: list[str] = []
    for name, value in options.items():
        if value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def wrong_options(python: str, options: Options, environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each option that this SGLang does not have or that is not for a user to set, and what to do instead.

    Raises:
        ConfigError: the interpreter is not there, or cannot run SGLang.
    """
    known = option_names(python, tuple(sorted(environment.items())))
    for name in options:
        if name in OURS:
            yield name, f"is decided by {OURS[name]}; leave it out"
        elif name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"see {python} -m sglang.launch_server --help"
            yield name, f"is no option of this SGLang; {hint}"


@cache
def option_names(python: str, environment: tuple[tuple[str, str], ...] = ()) -> frozenset[str]:
    """Return the options of the SGLang of this interpreter, with underscores, as its own help lists them."""
    command = [python, "-m", "sglang.launch_server", "--help"]
    said = " ".join(command)
    try:
        shown = subprocess.run(
            command, env=own_environment(dict(environment)), capture_output=True, text=True, timeout=_HELP_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"could not run {said}: {error}; give the interpreter that SGLang is installed for"
        ) from error
    names = frozenset(name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", shown.stdout))
    if shown.returncode or "model_path" not in names:
        last = (shown.stderr.strip() or shown.stdout.strip()).rpartition("\n")[2]
        raise ConfigError(f"{said} ended with status {shown.returncode}: {last}")
    return names


def own_environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return this process's variables without those of its own interpreter and rank, and with more."""
    inherited = {name: value for name, value in os.environ.items() if not _NOT_THEIRS.fullmatch(name)}
    return inherited | dict(more)
