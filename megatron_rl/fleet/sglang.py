"""SGLang servers, started with the interpreter of their own Python environment; SGLang is never imported."""

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
FIXED_OPTIONS: Mapping[str, str] = {
    "model_path": "model.path",
    "model": "model.path",
    "host": "this run: its own servers listen on this machine only",
    "port": "this run: every server has a free port",
    "weight_version": "this run: every push sets its version",
}
"""Options of SGLang that the user cannot set -> what sets them."""
NEVER_TIED = frozenset({"glm4_moe", "mixtral", "qwen2_moe", "qwen3_moe"})
"""Values of ``model_type`` whose output head SGLang 0.5.23 never ties to the embedding, whatever config.json says."""
_HELP_SECONDS = 180
_GRACE_SECONDS = 30.0
"""SGLang checks for a stop request every 5 s and then frees GPU memory, which SIGKILL would not free."""
_PRIVATE_VARIABLES = re.compile(
    r"PYTHON(PATH|HOME)|VIRTUAL_ENV|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
)
"""Environment variables of this process's interpreter and ranks, which a server must not inherit."""


def sglang_server(
    python: str,
    model_path: str,
    log_path: Path,
    options: Options,
    environment: Mapping[str, str],
    host: str = "127.0.0.1",
) -> ServerProcess:
    """Return an SGLang server that is not started yet.

    Args:
        python: interpreter of the environment that SGLang is installed in.
        model_path: folder of a Hugging Face checkpoint; its weights become version 0.
        log_path: file for the server's output.
        options: command-line options by name with underscores; ``True`` is a flag without a value.
        environment: variables added to this process's.
        host: address to listen on.
    """
    require_model(model_path)
    port = free_port(host)
    all_options: Options = {"model_path": model_path, "host": host, "port": port, "weight_version": "0", **options}
    command = [python, "-m", "sglang.launch_server", *arguments(all_options)]
    return ServerProcess(command, host, port, log_path, server_environment(environment), _GRACE_SECONDS)


def arguments(options: Options) -> list[str]:
    """Return the options as command-line arguments; one that is ``False`` is left out."""
    args: list[str] = []
    for name, value in options.items():
        if value is not False:
            args += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return args


def wrong_options(python: str, options: Options, environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (name, what to do instead) for each option that this SGLang does not have or that the user cannot set.

    Raises:
        ConfigError: the interpreter does not exist, or cannot run SGLang.
    """
    known = option_names(python, tuple(sorted(environment.items())))
    for name in options:
        if name in FIXED_OPTIONS:
            yield name, f"is decided by {FIXED_OPTIONS[name]}; leave it out"
        elif name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"see {python} -m sglang.launch_server --help"
            yield name, f"is not an option of this SGLang; {hint}"


@cache
def option_names(python: str, environment: tuple[tuple[str, str], ...] = ()) -> frozenset[str]:
    """Return the option names, with underscores, that the help of this interpreter's SGLang lists."""
    command = [python, "-m", "sglang.launch_server", "--help"]
    text = " ".join(command)
    try:
        shown = subprocess.run(
            command, env=server_environment(dict(environment)), capture_output=True, text=True, timeout=_HELP_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"could not run {text}: {error}; give the interpreter that SGLang is installed for"
        ) from error
    names = frozenset(name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", shown.stdout))
    if shown.returncode or "model_path" not in names:
        last = (shown.stderr.strip() or shown.stdout.strip()).rpartition("\n")[2]
        raise ConfigError(f"{text} ended with status {shown.returncode}: {last}")
    return names


def server_environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment variables, without those of its interpreter and rank, and with ``more``."""
    inherited = {name: value for name, value in os.environ.items() if not _PRIVATE_VARIABLES.fullmatch(name)}
    return inherited | dict(more)
