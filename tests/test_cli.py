"""Arguments of the command line."""

import pytest

from megatron_rl.cli import _parse, main


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
