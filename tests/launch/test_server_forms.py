"""A server that holds weights in another form than the run pushes is refused by check, preflight and at the start."""

import json
import logging
import time
from pathlib import Path

import pytest

from megatron_rl.config.load import Loaded, load
from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError, RolloutError
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.members import Timeouts
from megatron_rl.fleet.quantization import FormJudge
from megatron_rl.fleet.registry import Registry
from megatron_rl.launch.server_forms import check_server_forms, form_judge
from megatron_rl.launch.slurm.fleet_check import check_fleet
from megatron_rl.weights.tensor import TensorTransport
from tests.fleet.fake import FakeServer, serving

pytestmark = pytest.mark.processes

DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
LABEL = "FP8 in blocks of 128 x 128 with float32 scales"
TIMEOUTS = Timeouts(control_timeout_seconds=2, start_timeout_seconds=2, probe_seconds=0.05, probe_timeout_seconds=1)


def loaded(*urls: str, **settings: object) -> Loaded[Run]:
    words = [f"rollout.urls={json.dumps(urls)}", "rollout.start_timeout_seconds=1", 'rollout.engine="sglang"']
    return load(Run, [str(DEMO)], [*words, *(f"{key.replace('__', '.')}={value}" for key, value in settings.items())])


def folder_of(path: Path, **config: object) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def quantized_servers(tmp_path: Path) -> dict[str, tuple[FakeServer, str]]:
    """Return a server for each way to find out that it is quantized, with the words that say so."""
    named, optional, foldered, scaled, told = (FakeServer() for _ in range(5))
    named.info = {"quantization_config": FP8}
    optional.info = {"quantization": "fp8", "model_path": "elsewhere"}
    foldered.info = {"quantization": None, "model_path": folder_of(tmp_path / "m", quantization_config=FP8)}
    scaled.info = {"model_path": "elsewhere"}
    scaled.tensor = "model.layers.0.mlp.gate_up_proj.weight_scale_inv"
    told.info = {"quantization_config": {"quant_method": "awq"}}
    return {
        "server info": (named, f"({LABEL})"),
        "option": (optional, "(fp8), but the run would push float32"),
        "folder": (foldered, f"({LABEL}), but"),
        "names": (scaled, "(unknown), but"),
        "a method that is not supported": (told, "(awq), but"),
    }


@pytest.mark.parametrize("way", ["server info", "option", "folder", "names", "a method that is not supported"])
def test_a_quantized_server_is_refused_before_it_is_sent_plain_tensors(tmp_path, capsys, way):
    server, words = quantized_servers(tmp_path)[way]
    with serving(FakeServer(), server) as (good, _):
        config = loaded(good.url, server.url)
        assert check_fleet(config.run) == 1  # the preflight
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("preflight:")]
        assert server.url in line
        assert words in line
        with pytest.raises(RolloutError, match="holds quantized weights") as refused:
            open_fleet([good.url, server.url], form_judge(config.run))
        assert server.url in str(refused.value)
        if way == "names":  # check does not make a server compute the checksums of all its weights
            assert any(server.url in line for line in check_server_forms(config))
            return
        with pytest.raises(ConfigError, match="start it with a checkpoint that is not quantized") as problem:
            check_server_forms(config)
        assert f"): {server.url} holds quantized" in str(problem.value)
    assert not [path for path in server.calls if "update" in path]


def open_fleet(urls: list[str], judge: FormJudge, registry: Registry | None = None) -> Fleet:
    return Fleet.open(urls, TensorTransport(1 << 16), TIMEOUTS, registry=registry, judge=judge)


def test_servers_without_quantization_pass_and_silent_ones_are_named(tmp_path):
    told, foldered, quiet = FakeServer(), FakeServer(), FakeServer()
    told.info = {"quantization_config": None}
    foldered.info = {"model_path": folder_of(tmp_path / "m", model_type="llama")}
    with serving(told, foldered, quiet):
        config = loaded(told.url, foldered.url, quiet.url, "http://127.0.0.1:9")
        silent, away = check_server_forms(config)
        assert silent.startswith(f"{quiet.url} did not tell")
        assert away.startswith("http://127.0.0.1:9 did not tell how it holds its weights: it does not answer")
        with open_fleet([told.url, foldered.url, quiet.url], form_judge(config.run)) as fleet:
            assert len(fleet.urls) == 3
    assert not quiet.calls["/update_weights_from_tensor"]


def test_the_registry_is_asked_too(tmp_path):
    server = FakeServer()
    server.info = {"quantization_config": FP8}
    with serving(server):
        Registry(tmp_path).add(0, server.url)
        with pytest.raises(ConfigError, match=r"rollout.registry \(command line: .*\): http.* holds quantized"):
            check_server_forms(loaded(rollout__registry=tmp_path))


def test_a_quantized_joiner_stays_outside(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    first, joiner = FakeServer(), FakeServer()
    joiner.info = {"quantization_config": FP8}
    with serving(first, joiner):
        registry = Registry(tmp_path)
        registry.add(0, first.url)
        with open_fleet([first.url], form_judge(loaded().run), registry) as fleet:
            registry.add(1, joiner.url)
            deadline = time.monotonic() + 10
            while len(fleet.members) < 2 or fleet.members[1].failures < 3:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert fleet.urls == [first.url]
            assert "holds quantized weights" in fleet.members[1].reason
            assert caplog.text.count("cannot join the fleet: ") == 1
            assert not joiner.calls["/generate"]
