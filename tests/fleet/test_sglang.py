"""How servers of SGLang are started, with an interpreter that only prints."""

import stat
from pathlib import Path

import pytest

from megatron_rl.errors import ConfigError
from megatron_rl.fleet.sglang import arguments, option_names, sglang_server, wrong_options

pytestmark = pytest.mark.processes

HELP = """usage: launch_server.py [-h] --model-path MODEL_PATH [--host HOST] [--tp-size N]
options:
  --tensor-parallel-size N, --tp-size N
  --mem-fraction-static F   lower it at out-of-memory
  --sleep-on-idle
"""


def interpreter(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def python(tmp_path: Path) -> str:
    (tmp_path / "help").write_text(HELP)
    return interpreter(tmp_path, f'echo "$@ $HINT" >>{tmp_path}/asked; cat {tmp_path}/help')


def test_options_are_those_of_the_help_and_it_is_asked_once(python: str, tmp_path: Path) -> None:
    names = {"model_path", "host", "tp_size", "tensor_parallel_size", "mem_fraction_static", "sleep_on_idle"}
    for _ in range(2):
        assert option_names(python, (("HINT", "cpu"),)) == names
    assert (tmp_path / "asked").read_text() == "-m sglang.launch_server --help cpu\n"


def test_wrong_options_are_told_with_what_is_meant(python: str) -> None:
    options = {"tp_siz": 2, "tp_size": 2, "model_path": "x", "zzz": True}
    told = dict(wrong_options(python, options, {}))
    assert told.keys() == {"tp_siz", "model_path", "zzz"}
    assert "did you mean tp_size?" in told["tp_siz"]
    assert "decided by model.path" in told["model_path"]
    assert "launch_server --help" in told["zzz"]


def test_an_interpreter_without_sglang_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    python = interpreter(tmp_path, "echo Traceback >&2; echo 'No module named sglang' >&2; exit 1")
    with pytest.raises(ConfigError, match="ended with status 1: No module named sglang"):
        option_names(python)


def test_a_command_has_dashes_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments({"a_b": 1, "flag": True, "off": False, "c": "x"}) == ["--a-b", "1", "--flag", "--c", "x"]
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("PYTHONPATH", "ours")
    monkeypatch.setenv("HINT", "inherited")
    server = sglang_server("py", str(tmp_path), tmp_path / "log", {"tp_size": 2}, {"MORE": "1"})
    assert server.command[:5] == ["py", "-m", "sglang.launch_server", "--model-path", str(tmp_path)]
    assert server.command[-4:] == ["--weight-version", "0", "--tp-size", "2"]
    assert server.environment["HINT"] == "inherited"
    assert server.environment["MORE"] == "1"
    assert not {"LOCAL_RANK", "PYTHONPATH"} & server.environment.keys()
