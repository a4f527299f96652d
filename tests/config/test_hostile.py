"""Config files and settings that no run can use end in one error, which says where it was written."""

import contextlib
import random
import tomllib
from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run, load_run
from megatron_rl.config.section import MAX_INTEGER
from megatron_rl.errors import ConfigError

DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"


@pytest.mark.parametrize(
    "word",
    [
        *("parallel.tensor=inf", "train.steps=nan", "train.steps=1e400", "optimizer.lr=inf", "train.steps=-inf"),
        *("train.seed=12345678901234567890", "train.seed=-1", f"train.steps={MAX_INTEGER + 1}", "train.steps=1_0e5"),
        *("rollout.sampling.top_k=9223372036854775808", "rollout.sampling.stop_token_ids=[-1]"),
        *("rollout.sampling.stop_token_ids=[1e30]", "reward.workers=100000000", f"train.steps={'1' * 5000}"),
        *(
            f"task.mixture={'[' * 5000}",
            f"task.mixture={'[' * 5000}{']' * 5000}",
            f"a={'{b=' * 3000}",
            "a" * 300 + "=1",
        ),
        *("log.profile_steps=[99999999999999999999]", "train.steps=\0", "x\0=1"),
    ],
    ids=range(21),
)
def test_a_value_that_no_run_can_use_is_one_error(word):
    with pytest.raises(ConfigError, match="command line"):
        load_run([str(DEMO), word])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.toml", b"# a comment\n# \xe9\n", r"not UTF-8: .*latin\.toml:2"),
        ("deep.toml", b"x = " + b"[" * 5000, r"nested too deeply \(.*deep\.toml"),
        ("digits.toml", b"x = " + b"1" * 5000, r"not valid TOML: .*digits\.toml"),
        ("deep.json", b"[" * 100_000, r"not valid JSON: .*deep\.json"),
        ("digits.json", b'{"x": ' + b"1" * 5000 + b"}", r"not valid JSON: .*digits\.json"),
        ("nul.toml", b"x = 1\0", r"not valid TOML: .*nul\.toml"),
        ("utf16.toml", "x = 1".encode("utf-16"), "not UTF-8"),
    ],
    ids=["latin", "deep", "digits", "deep json", "digits json", "nul", "utf16"],
)
def test_a_file_that_is_no_config_is_one_error_with_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(Run, [tmp_path / name])


def test_a_byte_order_mark_is_no_part_of_the_config(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf[train]\nsteps = 7\n[model]\npath = 'x'\n")
    assert load(Run, [tmp_path / "a.toml"]).run.train.steps == 7


def test_damaged_configs_load_or_end_in_one_error(tmp_path):
    generator, text = random.Random(0), DEMO.read_bytes()
    for number in range(300):
        raw = bytearray(text)
        for _ in range(generator.randrange(1, 4)):
            start = generator.randrange(len(raw))
            match generator.randrange(4):
                case 0:
                    raw[start] = generator.randrange(256)
                case 1:
                    del raw[start : start + generator.randrange(1, 9)]
                case 2:
                    raw[start:start] = generator.choice([b"1e999", b"-", b"[", b'"', b"\0", b"nan", b"9" * 30, b"\n"])
                case _:
                    raw[start:start] = raw[: generator.randrange(80)]
        file = tmp_path / f"{number}.toml"
        file.write_bytes(raw)
        with contextlib.suppress(ConfigError):
            load(Run, [file])


def test_every_integer_has_bounds_on_both_sides():
    huge = 10**30
    table = tomllib.loads(DEMO.read_text())
    for section in ("train", "rollout", "checkpoint", "evaluate", "log", "slurm", "parallel", "weights", "reward"):
        for name, field in Run.model_fields[section].annotation.model_fields.items():  # pyrefly: ignore
            if (
                "int" in str(field.annotation)
                and table.get(section, {}).get(name) is None
                and "Section" not in str(field)
            ):
                with pytest.raises(ConfigError):
                    load(Run, [DEMO], [f"{section}.{name}={huge}"])
