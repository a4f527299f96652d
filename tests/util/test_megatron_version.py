from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError
from megatron_rl.launch.planning.run_plan import make_plan
from megatron_rl.util import megatron_version

DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"


@pytest.mark.parametrize("found", ["0.16.1", "0.17.1", "0.18.2", "0.19.2"])
def test_tested_releases_are_accepted(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(megatron_version, "version", lambda name: found)
    assert megatron_version.untested_megatron() is None


@pytest.mark.parametrize("found", ["0.15.3", "0.20.0", "0.1.0", "1.16.0"])
def test_another_release_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(megatron_version, "version", lambda name: found)
    with pytest.raises(ConfigError, match=rf"megatron-core {found} is installed.*0\.16, 0\.17.*untested_megatron"):
        make_plan(load(Run, [str(DEMO)], []), ranks=2)
    make_plan(load(Run, [str(DEMO)], ["model.untested_megatron=true"]), ranks=2)
