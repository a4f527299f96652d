"""The verbs ``configs``, ``init`` and ``completion``."""

import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.config.load import load, split_words
from megatron_rl.config.schema import Run
from megatron_rl.config.shipped import configs_folder, shipped_configs, summary

CONFIGS = shipped_configs()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_shipped_configs_are_listed_with_a_sentence(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(CONFIGS)
    assert {"demo", "objective/gspo", "models/qwen3-30b-a3b-1node"} < set(CONFIGS)
    assert all(len(summary(file)) > 10 for file in CONFIGS.values())
    assert (
        summary(CONFIGS["demo"]) == "The demo: a tiny Qwen3-MoE learns arithmetic, with Megatron parallelism, on a CPU"
    )
    assert summary(CONFIGS["environment/calculator"]) == "The demo with a calculator"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copied_config_loads_and_every_file_that_it_names_is_copied(name, elsewhere, capsys):
    names = [name] if name == "demo" or name.startswith("models/") else ["demo", name]
    assert main(["init", *names]) == 0
    files = [str(Path("configs", f"{name}.toml")) for name in names]
    assert capsys.readouterr().out.splitlines()[-1] == f"next: megatron-rl check {' '.join(files)}"
    run = load(Run, files).run
    assert Path(run.model.path).is_relative_to(elsewhere)
    assert Path(run.model.path, "config.json").is_file()
    for copy in (path for path in Path("configs").rglob("*") if path.is_file()):
        assert copy.read_bytes() == (configs_folder() / copy.relative_to("configs")).read_bytes()


def test_an_edited_config_is_never_overwritten(elsewhere, capsys):
    for _ in range(2):  # equal files are no obstacle
        assert main(["init", "demo"]) == 0
    Path("configs/demo.toml").write_text("[train]\n")
    assert main(["init", "objective/gspo", "demo"]) == 2
    assert "configs/demo.toml exists and differs from the shipped one; remove it" in capsys.readouterr().err
    assert not Path("configs/objective").exists()
    assert main(["init", "demo", "--folder", "mine"]) == 0
    assert Path("mine/demo.toml").is_file()


@pytest.mark.parametrize(
    ("name", "hint"), [("demoo", "did you mean demo?"), ("gsp", "objective/gspo?"), ("q", "lists")]
)
def test_an_unknown_config_says_what_to_write(name, hint, elsewhere, capsys):
    assert main(["init", name]) == 2
    said = capsys.readouterr().err
    assert f"no shipped config {name!r}; " in said
    assert hint in said


@pytest.mark.parametrize(("word", "name"), [("configs/demo.toml", "demo"), ("objective/gspo.toml", "objective/gspo")])
def test_a_missing_file_that_is_shipped_says_how_to_get_it(word, name, elsewhere, capsys):
    assert main(["train", word]) == 2
    assert f"no config file {word}; `megatron-rl init {name}` copies the shipped one" in capsys.readouterr().err


def completed(script: Path, *words: str) -> set[str]:
    """Return what bash offers for the last of the words."""
    quoted = " ".join(f"'{word}'" for word in words)
    call = f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _megatron_rl"
    code = call + "; printf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.processes
def test_commands_options_settings_and_files_are_completed(elsewhere, capsys):
    assert main(["completion", "bash"]) == 0
    script = elsewhere / "script"
    script.write_text(capsys.readouterr().out)
    (elsewhere / "train.toml").touch()
    (elsewhere / "training").mkdir()
    assert completed(script, "megatron-rl", "con") == {"configs", "convert"}
    assert completed(script, "megatron-rl", "help", "ev") == {"eval"}
    assert completed(script, "megatron-rl", "convert", "ver") == {"verify"}
    assert completed(script, "megatron-rl", "prove", "--sh") == {"--shrink"}
    assert completed(script, "megatron-rl", "train", "train.ste") == {"train.steps=", "train.step_timeout_seconds="}
    assert completed(script, "megatron-rl", "train", "train.t") >= {"train.toml", "train.tokens_per_microbatch="}
    assert completed(script, "megatron-rl", "train", "traini") == {"training/"}
    assert completed(script, "megatron-rl", "train", "objective.name=gs") == {"objective.name=gspo"}
    assert completed(script, "megatron-rl", "report", "train.st") == set()


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_the_script_for_zsh_is_valid(elsewhere, capsys):
    assert main(["completion", "zsh"]) == 0
    (elsewhere / "script").write_text(capsys.readouterr().out)
    subprocess.run(["zsh", "-fc", f"source {elsewhere / 'script'}"], check=True)


def test_every_setting_that_is_completed_exists(capsys):
    assert main(["completion", "bash"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("_megatron_rl_settings=")]
    words = line.partition('"')[2].rstrip('"').split()
    assert len(words) == len(set(words)) > 200
    _, settings = split_words(words)
    assert settings == words
