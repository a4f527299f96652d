"""Arguments of the command line."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rl.cli import _parse, main
from megatron_rl.launch.quiet import UPSTREAM_MESSAGES, quiet_upstream

ROOT = Path(__file__).resolve().parents[1]


def test_settings_may_precede_and_follow_options():
    options = _parse(["prove", "a.toml", "--layout", "tensor=2", "x=1", "--shrink", "layers=2", "y=2"])

    assert (options.config, options.layout, options.shrink) == (["a.toml", "x=1", "y=2"], ["tensor=2"], "layers=2")


@pytest.mark.parametrize(
    "words", [["train", "a.toml", "--stepz"], ["debug-nonfinite", "file", "x=1"], ["prove", "--layout"]]
)
def test_unknown_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)

    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "hint"),
    [
        ("trian", "did you mean `train`?"),
        ("preflight", "`check --cluster`"),
        ("replay-rank", "`debug-nonfinite`"),
        ("xyz", "one of train, check, "),
    ],
)
def test_an_unknown_command_says_what_to_write(verb, hint, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([verb, "a.toml"])

    said = capsys.readouterr().err
    assert f"error: no command {verb!r}; " in said
    assert hint in said


@pytest.mark.parametrize("words", [["train", "train.steps"], ["eval", "nosuch"]])
def test_a_word_that_is_no_file_and_no_setting_says_what_to_write(words, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{words[1]} is no file, folder or setting; write a file ending in .toml, or section.key=value" in said


def test_a_folder_without_weights_cannot_be_served(tmp_path, capsys):
    shutil.copy(ROOT / "configs" / "demo-model" / "config.json", tmp_path)
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert capsys.readouterr().err.startswith(f"megatron-rl serve: no weights in {tmp_path}: ")


def test_a_file_that_no_run_saved_cannot_be_debugged(tmp_path, capsys):
    def message(file):
        assert main(["debug-nonfinite", str(file)]) == 2
        return capsys.readouterr().err

    assert f"no such file: {tmp_path / 'nothing'}; give " in message(tmp_path / "nothing")
    assert f"{tmp_path} is a folder; give " in message(tmp_path)
    row = tmp_path / "nonfinite" / "row.safetensors"
    row.parent.mkdir()
    row.write_bytes(b"x")
    assert f"{tmp_path} is a folder; did you mean {row}?" in message(tmp_path)
    assert f"{row} is not a safetensors file (" in message(row)
    save_file({"x": torch.zeros(1)}, row)
    assert "its header has no 'run'; give " in message(row)
    save_file({"x": torch.zeros(1)}, row, {"run": "{}", "ranks": "1", "message": ""})
    assert "saved by another version of megatron-rl" in message(row)


def test_upstream_messages_are_dropped_by_their_beginning_only(caplog):
    quiet_upstream()
    for name, start in UPSTREAM_MESSAGES.items():
        logging.getLogger(name).warning("%s and more", start)
        logging.getLogger(name).warning("another message")
    assert caplog.messages == ["another message"] * len(UPSTREAM_MESSAGES)
