"""What the command line takes, in which order."""

import pytest

from megatron_rl.cli import _parse, main


def test_settings_may_stand_before_and_after_options():
    options = _parse(["prove", "a.toml", "--layout", "tensor=2", "x=1", "--shrink", "layers=2", "y=2"])

    assert (options.config, options.layout, options.shrink) == (["a.toml", "x=1", "y=2"], ["tensor=2"], "layers=2")


@pytest.mark.parametrize(
    "words", [["train", "a.toml", "--stepz"], ["debug-nonfinite", "file", "x=1"], ["prove", "--layout"]]
)
def test_what_no_verb_knows_is_refused(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)

    assert "error: " in capsys.readouterr().err
