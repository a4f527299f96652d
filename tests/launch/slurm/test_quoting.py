"""No text of a user reaches the job script unquoted, and no secret reaches a file that others can read."""

import json
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rl.config.load import load, to_json
from megatron_rl.config.schema import Run
from megatron_rl.config.secret_settings import split_secrets, to_toml
from megatron_rl.config.sources import read_file, read_overrides
from megatron_rl.distributed import mesh
from megatron_rl.errors import ConfigError
from megatron_rl.launch.slurm import render as rendering
from megatron_rl.launch.slurm.render import JOB, SECRETS, render, slurm

DEMO = Path(__file__).parents[3] / "configs" / "demo.toml"
BASE = ("slurm.nodes=2", "slurm.gpus_per_node=0")

HOSTILE = st.text(
    st.sampled_from(list("ab %$`'\"\\;&|<>(){}[]#!*?~=-\n\r\t\x00\x0b\x0c\x1b\x7f\x85\u2028\u202e\ufeff")), max_size=30
).filter(lambda text: "\x00" not in text)
SHELL = st.sampled_from(
    ["\ntouch marker\n", "$(touch marker)", "`touch marker`", "'; touch marker; '", "\r\ntouch marker"]
)
TEXT = st.one_of(HOSTILE, st.builds("{}{}{}".format, HOSTILE, SHELL, HOSTILE))


@pytest.fixture
def no_plan(monkeypatch):
    """Skip the plan, which reads the model and takes most of the time."""

    class Plan:
        missing: tuple[str, ...] = ()

    monkeypatch.setattr(rendering, "make_plan", lambda *_, **__: Plan())


def quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_top(script: str, folder: Path) -> list[str]:
    """Run the part of a script that depends on the settings, with nothing to run, and return the values it sets."""
    top = script.partition("# ---- The rest")[0]
    show = 'printf \'%s\\0\' "$run" "${config[@]}"'
    done = subprocess.run(
        ["bash", "-c", f'PATH=/nonexistent; cd() {{ printf "%s\\0" "$1"; }}\n{top}\n{show}'],
        cwd=folder, capture_output=True, check=True, env={},
    )  # fmt: skip
    assert done.stderr == b""
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.processes
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=TEXT, where=st.sampled_from(["path", "option", "name", "image", "mount", "python", "word", "file", "folder"])
)
def test_a_shell_reads_every_setting_as_text(tmp_path, no_plan, text, where):
    run, folder, file = tmp_path / "run", tmp_path, str(DEMO)
    words = [*BASE]
    if where == "path":
        run = tmp_path / f"run{text.replace('/', '_')}"
    elif where == "folder":
        folder = tmp_path / f"f{text}"
    elif where == "file":
        file = f"config{text}.toml"
    elif where == "word":
        words.append(f"slurm.python={quoted(text or 'python')}")
    else:
        words += {
            "option": [f"slurm.options={{ comment = {quoted(text)} }}"],
            "name": [f"slurm.options={{ {quoted(text)} = 'x' }}"],
            "image": ["slurm.container=pyxis", f"slurm.image={quoted(text or 'i')}"],
            "mount": ["slurm.container=apptainer", "slurm.image=i", f"slurm.mounts=[{quoted(text)}]"],
            "python": [f"slurm.python={quoted(text)}"],
        }[where]
    words.append(f"log.path={quoted(str(run))}")
    try:
        loaded = load(Run, [str(DEMO)], words)
        script = render(loaded, [file, *words], folder)
    except ConfigError:
        return  # refused, as the text must not be
    header, _, body = script.partition("\ncd ")
    assert [line for line in header.splitlines() if line and not line.startswith("#")] == []
    assert len([line for line in header.split("\n") if line.startswith("#SBATCH")]) == header.count("#SBATCH")
    found = read_top(script, tmp_path)
    assert found == [str(folder), str(Path(loaded.run.log.path).absolute()), file, *words]
    assert not list(tmp_path.rglob("marker"))
    step = next(line for line in shlex.split(body.partition("\nstep() { exec ")[2].partition(' "$@"; }')[0]) if line)
    assert step == "srun"


@pytest.mark.processes
def test_percent_signs_of_the_run_folder_are_not_patterns_of_slurm(tmp_path, no_plan):
    words = [*BASE, f"log.path={tmp_path}/100%j"]
    script = render(load(Run, [str(DEMO)], words), [str(DEMO), *words], tmp_path)
    assert f"#SBATCH --output={tmp_path}/100%%j/slurm/job-%j.log\n" in script
    assert not re.search(r'--output="\$logs', script)
    value = subprocess.run(["bash", "-c", 'logs="a%j"; echo "${logs//%/%%}"'], capture_output=True, text=True).stdout
    assert value == "a%%j\n"


def test_secrets_are_in_a_file_of_the_user_only(tmp_path, no_plan, capsys):
    words = [
        *(
            f"log.path={tmp_path}/run",
            "rollout.environment.HF_TOKEN=hf_4711",
            "rollout.environment.OMP_NUM_THREADS='3'",
        ),
        'rollout.sglang={ dist_init_addr = "http://me:hunter2@host" }',
        *BASE,
    ]
    loaded = load(Run, [str(DEMO)], words)
    assert slurm(loaded, [str(DEMO), *words], submit=False) == 0
    script, secrets = (tmp_path / "run" / JOB).read_text(), tmp_path / "run" / SECRETS
    for secret in ("hf_4711", "hunter2"):
        assert secret not in script + capsys.readouterr().out + to_json(loaded.run)
        assert secret in secrets.read_text()
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o600
    found = shlex.split(script.partition("config=(")[2].partition(")")[0])
    again = load(Run, [DEMO, secrets], [word for word in found if word not in (str(DEMO), str(secrets))])
    assert again.run == loaded.run


def test_a_saved_configuration_is_read_without_its_masked_secrets(tmp_path):
    words = ["rollout.environment={ API_KEY = 'x', OMP_NUM_THREADS = '3' }"]
    (tmp_path / "config.json").write_text(to_json(load(Run, [DEMO], words).run))
    assert load(Run, [tmp_path / "config.json"]).run.rollout.environment == {"OMP_NUM_THREADS": "3"}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(st.sampled_from("abcXYZ_09"), min_size=1), st.text(max_size=20), max_size=4))
def test_the_file_of_secrets_has_the_same_values(tmp_path_factory, variables):
    words = ["rollout.environment={ " + ", ".join(f"{quoted(k)} = {quoted(v)}" for k, v in variables.items()) + " }"]
    _, secret = split_secrets(["a.toml", *words])
    file = tmp_path_factory.mktemp("secrets") / "s.toml"
    file.write_text(to_toml(secret), encoding="utf-8", newline="")
    expected = read_overrides(words).table["rollout"]
    assert read_file(file).table == ({"rollout": expected} if variables else {})


def test_gloo_uses_the_interface_of_slurm_s_address(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv(mesh.NODES, "n0=10.0.0.1 n1=127.0.0.1")
    assert mesh.slurm_interface() == "lo"
    monkeypatch.setenv(mesh.NODES, "n1=192.0.2.1")  # no interface has this address of documentation
    assert mesh.slurm_interface() is None
    monkeypatch.delenv(mesh.NODES)
    assert mesh.slurm_interface() is None
