"""Merging, origins and error messages of configurations, with a small schema."""

import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from megatron_rl.config.load import Loaded, load, settings, to_json
from megatron_rl.config.section import InputPath, PathToFunction, Section
from megatron_rl.config.sources import key_lines, parse_value
from megatron_rl.errors import ConfigError


class Square(Section):
    name: Literal["square"] = "square"
    side: float = 1.0


class Circle(Section):
    name: Literal["circle"] = "circle"
    radius: float = 1.0
    """Distance of the rim."""


class Paint(Section):
    colour: Literal["red", "green"] = "red"
    layers: Annotated[int, Field(ge=1)] = 1


class Wall(Section):
    place: InputPath
    """Position."""
    judge: PathToFunction = "plain"
    height_metres: float = 2.0
    urls: tuple[str, ...] = ()
    extra: dict[str, bool | int | float | str] = Field(default_factory=dict)
    paint: Paint = Paint()
    least: int = 0
    most: int = 9

    @model_validator(mode="after")
    def _ordered(self) -> "Wall":
        if self.least > self.most:
            raise ValueError(f"least {self.least} is above most {self.most}; swap them")
        return self


class Tree(Section):
    wall: Wall
    shape: Annotated[Square | Circle, Field(discriminator="name")] = Square()
    bare: bool = False


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def problems(*files: Path, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(Tree, files, overrides)
    text = str(caught.value)
    lines = text.splitlines()
    return [line.removeprefix("  - ") for line in lines[1:]] if lines[0].endswith("problems:") else [text]


def good(*files: Path, overrides: tuple[str, ...] = ()) -> Loaded[Tree]:
    return load(Tree, files, overrides)


def test_later_files_and_then_overrides_win_per_key(write):
    first = write("a.toml", '[wall]\nplace = "x"\nheight_metres = 3\npaint = { colour = "green", layers = 2 }\n')
    second = write("b.toml", "[wall.paint]\nlayers = 3\n")
    loaded = good(first, second, overrides=("wall.height_metres=4.5", "bare=true"))
    assert loaded.run.wall.paint == Paint(colour="green", layers=3)
    assert loaded.run.wall.height_metres == 4.5
    assert loaded.run.bare is True
    assert loaded.origin("wall.paint.colour") == f"{first}:4"
    assert loaded.origin("wall.paint.layers") == f"{second}:2"
    assert loaded.origin("wall.height_metres") == "command line: wall.height_metres=4.5"
    assert loaded.origin("wall.least") == "default"


def test_the_last_of_equal_words_wins(write):
    file = write("a.toml", '[wall]\nplace = "x"\n')
    words = (
        "wall.height_metres=1",
        'wall.paint={ colour = "red" }',
        "wall.height_metres=2",
        "wall.paint={ layers = 3 }",
    )
    loaded = good(file, overrides=words)
    assert loaded.run.wall.height_metres == 2
    assert loaded.origin("wall.height_metres") == "command line: wall.height_metres=2"
    assert loaded.run.wall.paint == Paint(layers=3)


def test_a_table_with_another_discriminator_replaces_the_old_one(write):
    first = write("a.toml", '[wall]\nplace = "x"\n[shape]\nname = "circle"\nradius = 3.0\n')
    assert good(first, overrides=("shape.name=square",)).run.shape == Square()
    assert good(first, overrides=("shape.side=2", "shape.name=square")).run.shape == Square(side=2)
    assert good(first, overrides=("shape.radius=5",)).run.shape == Circle(radius=5)


def test_the_default_discriminator_may_be_omitted(write):
    assert good(write("a.toml", '[wall]\nplace = "x"\n[shape]\nside = 3.0\n')).run.shape == Square(side=3)


def test_input_paths_are_relative_to_their_file_and_overrides_to_the_working_directory(write, monkeypatch, tmp_path):
    file = write("deep/a.toml", '[wall]\nplace = "data/x"\njudge = "judge.py:f"\n')
    monkeypatch.chdir(tmp_path)
    wall = good(file).run.wall
    assert wall.place == str(tmp_path / "deep/data/x")
    assert wall.judge == str(tmp_path / "deep/judge.py:f")
    assert good(file, overrides=("wall.place=y",)).run.wall.place == str(tmp_path / "y")
    assert good(file, overrides=("wall.place=/abs", "wall.judge=plain")).run.wall.judge == "plain"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-6", 1e-6),
        ("true", True),
        ("runs/demo", "runs/demo"),
        ('"3"', "3"),
        ("[1, 2]", [1, 2]),
        ("{a = 1}", {"a": 1}),
        ("", ""),
        ("2026-11-21", "2026-11-21"),
        ("http://h:1/x?y=z", "http://h:1/x?y=z"),
    ],
)
def test_values_on_the_command_line(text, value):
    assert parse_value(text) == value


def test_all_problems_are_listed_with_origin_and_remedy(write):
    file = write(
        "a.toml",
        """\
[wall]
height_meters = 3
urls = "http://x"
radius = 2
[wall.paint]
colour = "gren"
layers = 2.0
[wall.extra]
list = [1]
[shape]
name = "sqare"
[brae]
""",
    )
    output = problems(file, overrides=("bare=yes", "wall.least=0"))
    assert output == [
        "wall.place is not set; write place = ... under [wall]: Position",
        f'wrong value for wall.urls: "http://x" ({file}:3); write ["http://x"]',
        f"wrong value for wall.extra.list: [1] ({file}:9); write true or false, or it should be a valid integer,"
        " or it should be a valid number, or it should be a valid string",
        f'wrong value for wall.paint.colour: "gren" ({file}:6); did you mean "green"? (one of "red", "green")',
        f"wrong value for wall.paint.layers: 2.0 ({file}:7); write 2",
        f"unknown key wall.height_meters: 3 ({file}:2); did you mean wall.height_metres?",
        f'unknown key wall.radius: 2 ({file}:4); did you mean shape.radius, with shape.name = "circle"?',
        f'no such shape.name: "sqare" ({file}:11); did you mean "square"? (one of "square", "circle")',
        'wrong value for bare: "yes" (command line: bare=yes); write true or false',
        f"unknown key brae: {{}} ({file}:12); did you mean bare?",
    ]


def test_an_option_of_another_objective_names_that_objective(write):
    file = write("a.toml", '[wall]\nplace = "x"\n[shape]\nname = "square"\nradius = 2.0\n')
    assert problems(file) == [f'unknown key shape.radius: 2.0 ({file}:5); it belongs to shape.name = "circle"']


def test_rules_between_fields_name_the_fields_and_their_origins(write):
    file = write("a.toml", '[wall]\nplace = "x"\nleast = 5\n')
    (output,) = problems(file, overrides=("wall.most=3",))
    assert output == f"wall: least 5 is above most 3; swap them ({file}:3, command line: wall.most=3)"


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_must_be_finite(write, value):
    file = write("a.toml", f'[wall]\nplace = "x"\nheight_metres = {value}\n')
    assert "it should be a finite number" in problems(file)[0]


def test_types_are_not_converted(write):
    file = write("a.toml", '[wall]\nplace = 3\nleast = "4"\nheight_metres = 2\nmost = true\n')
    assert problems(file) == [
        f'wrong value for wall.place: 3 ({file}:2); write "3" in quotes',
        f'wrong value for wall.least: "4" ({file}:3); write 4 without quotes',
        f"wrong value for wall.most: true ({file}:5); it should be a valid integer",
    ]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("[wall]\nplace = x\n", 2, "Invalid value"),
        ('[wall]\nplace = "x"\nplace = "y"\n', 3, "Cannot overwrite a value"),
        ("[wall]\n[wall]\n", 2, "Cannot declare ('wall',) twice"),
    ],
)
def test_bad_toml_names_file_and_line(write, text, line, reason):
    file = write("a.toml", text)
    (output,) = problems(file)
    assert output.startswith(f"not valid TOML: {reason}")
    assert f"({file}:{line})" in output


def test_a_missing_file_lists_the_existing_ones(write, tmp_path):
    file = write("demo.toml", "")
    (output,) = problems(tmp_path / "dmo.toml")
    assert output == f"no config file {tmp_path / 'dmo.toml'}; did you mean {file}?"
    both = problems(tmp_path / "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz", tmp_path / "dmo.toml")
    assert len(both) == 2
    assert str(file) in both[0]


def test_invalid_or_broken_overrides_are_errors(write):
    file = write("a.toml", '[wall]\nplace = "x"\n')
    output = problems(file, overrides=("foo", "wall..x=1", "bare=true", "wall.urls=[1", "shape=1", "shape.side=1"))
    assert [line.partition(":")[0] for line in output] == [
        "not an override",
        "not an override",
        "not a TOML value",
        "shape is both a value and a table; set one of them (command line",
    ]


def test_the_same_file_twice_is_an_error(write):
    file = write("a.toml", '[wall]\nplace = "x"\n')
    assert problems(file, file) == [f"config file given twice: {file}; give it once"]


def test_line_numbers_are_found_for_every_notation_of_a_key():
    text = '# a = 1\na = 1\n\n[b]\n"c" = 2\nd.e = 3\n[b.f] # why\n  g = { h = 1 }\n[[i]]\n'
    found = key_lines(text)
    assert found[("a",)] == 2
    assert found[("b", "c")] == 5
    assert found[("b", "d", "e")] == 6
    assert found[("b", "f", "g")] == 8


def test_the_saved_configuration_has_everything_except_passwords(write):
    file = write("a.toml", '[wall]\nplace = "x"\nurls = ["http://me:secret@host:1/x", "http://host:2"]\n')
    run = good(file).run
    saved = to_json(run)
    assert "secret" not in saved
    assert json.loads(saved)["wall"]["urls"] == ["http://***@host:1/x", "http://host:2"]
    assert json.loads(saved)["bare"] is False
    assert ("wall.place", run.wall.place, "Position.") in list(settings(run))


def test_the_config_json_of_a_run_is_read_like_a_file(write, tmp_path):
    first = load(Tree, [write("a.toml", '[wall]\nplace = "here"\nurls = ["http://a"]\n[shape]\nname = "circle"\n')])
    kept = write("config.json", to_json(first.run))
    again = load(Tree, [kept], ["wall.least=1"])
    assert again.run == first.run.model_copy(update={"wall": first.run.wall.model_copy(update={"least": 1})})
    assert again.origin("wall.height_metres") == str(kept)
    with pytest.raises(ConfigError, match="not valid JSON"):
        load(Tree, [write("cut.json", to_json(first.run)[:40])])
