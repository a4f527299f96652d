"""A server of a Slurm job is restarted at its address until the job ends."""

from pathlib import Path

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.errors import RolloutError
from megatron_rl.fleet.registry import END
from megatron_rl.launch.slurm import serve_node

DEMO = Path(__file__).parents[3] / "configs" / "demo.toml"


class BusyPort:
    """A server that dies once, whose port is in use at the first restart."""

    url, port = "http://127.0.0.1:1", 1

    def __init__(self, registry: Path) -> None:
        self.registry, self.starts, self.stopped = registry, 0, False
        self.exit_status: int | None = None

    def start(self) -> None:
        self.starts += 1
        if self.starts == 1:
            self.exit_status = 1
        elif self.starts == 2:
            raise RolloutError("cannot start a server on 127.0.0.1:1: Address already in use; choose another port")
        else:
            self.exit_status = None
            (self.registry / END).touch()

    def stop(self) -> None:
        self.stopped = True


def test_a_port_in_use_at_a_restart_is_tried_again(tmp_path, monkeypatch, caplog):
    server = BusyPort(tmp_path)
    monkeypatch.setattr(serve_node, "server_of", lambda run, number, host: server)
    monkeypatch.setattr(serve_node.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert serve_node.keep_server(load(Run, [DEMO]).run, tmp_path, "127.0.0.1") == 0
    assert (server.starts, server.stopped) == (3, True)
    assert "port 1 is still in use" in caplog.text
    assert (tmp_path / "server_0.json").is_file()
