"""Arguments of the command line."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import megatron_rl
from megatron_rl.cli import main
from megatron_rl.cli.command import parse
from megatron_rl.cli.verbs import VERBS
from megatron_rl.inference_server.serve import model_folder
from megatron_rl.launch.quiet import UPSTREAM_MESSAGES, quiet_upstream

ROOT = Path(__file__).resolve().parents[1]


def test_settings_may_precede_and_follow_options():
    options = parse(VERBS["prove"], ["a.toml", "--layout", "tensor=2", "x=1", "--shrink", "layers=2", "y=2"])

    assert (options.config, options.layout, options.shrink) == (["a.toml", "x=1", "y=2"], ["tensor=2"], "layers=2")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_has_one_line_per_command(words, capsys):
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for verb in VERBS.values():
        assert sum(line.startswith(f"  {verb.name} ") and line.endswith(verb.help) for line in lines) == 1


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-rl {megatron_rl.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_command_shows_its_examples(verb, capsys):
    for words in (["help", verb], [verb, "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(words)
        said = capsys.readouterr().out
        assert VERBS[verb].examples
        assert all(f"\n  megatron-rl {verb} {example}".rstrip() + "\n" in said for example in VERBS[verb].examples)


@pytest.mark.processes
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["help", "train"], ["convert", "--help"]])
def test_help_imports_no_large_package(words):
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from megatron_rl.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "numpy", "pydantic", "rich"} & set(done.stdout.split()) == set()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "a.toml", "--steps", "3"], "no option --steps; settings have no dashes: write train.steps=3"),
        (["train", "--lr=1e-5", "a.toml"], "no option --lr; settings have no dashes: write optimizer.lr=1e-5"),
        (["train", "--max-new-tokens", "5", "a.toml"], "write rollout.sampling.max_new_tokens=5"),
        (["train", "--train.steps", "a.toml"], "write train.steps=VALUE"),
        (["train", "a.toml", "--stepz", "3"], "write entropy.step=3 or train.steps=3"),
        (["prove", "a.toml", "--layuot", "x"], "no option --layuot; did you mean --layout?"),
        (["eval", "run", "--steps", "3"], "no option --steps; did you mean --step?"),
        (["train", "a.toml", "--qqq"], "no option --qqq; settings are written section.key=value"),
        (["report", "--qqq", "run"], "no option --qqq\n"),
        (["debug-nonfinite", "file", "x=1"], "no argument x=1: this command takes no more"),
        (["prove", "--layout"], "argument --layout: expected one argument; all arguments: megatron-rl prove --help"),
        (["train"], "are required: CONFIG|RUN|KEY=VALUE; all arguments: megatron-rl train --help"),
    ],
)
def test_an_unknown_argument_says_what_to_write(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)

    said = capsys.readouterr().err
    assert said.startswith(f"megatron-rl {words[0]}: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("verb", "hint"),
    [
        ("trian", "did you mean `train`?"),
        ("preflight", "`check --cluster`"),
        ("replay-rank", "`debug-nonfinite`"),
        ("xyz", "one of init, configs, "),
        ("my.toml", "write the command first: megatron-rl train my.toml"),
        ("--steps", "options follow a command: megatron-rl VERB --steps"),
    ],
)
def test_an_unknown_command_says_what_to_write(verb, hint, capsys):
    assert main([verb, "a.toml"]) == 2

    said = capsys.readouterr().err
    assert said.startswith("megatron-rl: no ")
    assert verb in said
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


def test_a_run_folder_is_served_from_the_weights_of_a_step(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model": {}, "task": {}, "train": {"steps": 4}}')
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert f"{tmp_path} has no weights yet" in capsys.readouterr().err
    for step in (2, 4):
        (tmp_path / "exports" / f"step_{step:08}").mkdir(parents=True)
    assert model_folder(str(tmp_path), None) == str(tmp_path / "exports" / "step_00000004")
    assert model_folder(str(tmp_path), 2) == str(tmp_path / "exports" / "step_00000002")
    assert model_folder(str(ROOT), None) == str(ROOT)
    assert main(["serve", str(ROOT), "--step", "2"]) == 2
    assert "--step 2 chooses a checkpoint of a run folder" in capsys.readouterr().err


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
