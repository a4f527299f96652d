"""Runs whose servers hold quantized weights: pushed quantized, explained in the mismatch report, resumed."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_rl.convert import to_hf, to_megatron
from megatron_rl.convert.to_hf import OutputFormat
from tests.e2e.job import ONE_RANK, ROOT, Job

CONSOLE = Console(quiet=True)


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in FP8."""
    folder = tmp_path_factory.mktemp("encoded")
    to_megatron.convert(ROOT / "configs" / "demo-model", folder / "core", 1, CONSOLE)
    to_hf.convert(folder / "core", folder / "fp8", OutputFormat(encoding="fp8"), 1, CONSOLE)
    return folder / "fp8"


@pytest.mark.parametrize(
    "carrier", ["auto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("disk", "stages"))]
)
def test_servers_with_fp8_weights_are_pushed_fp8_and_the_run_resumes(carrier: str, encoded: Path, tmp_path: Path):
    settings = (f"rollout.model_path={encoded}", "correction.kind=tis", f"weights.carrier={carrier}")
    with Job(tmp_path / "run", *settings, "train.steps=2", "checkpoint.every=1") as job:
        assert job.end() == 0, job.output()
    report = json.loads((tmp_path / "run" / "mismatch.json").read_text())
    assert report["cause"] == "quantization"
    assert report["causes"]["quantization"]["label"] == "FP8 in blocks of 128 x 128 with float32 scales"
    # Rounding alone explains 1e-4 nats here: the servers compute with FP8, and with the trainer's newest weights.
    assert 1e-4 < report["gap"]["abs_mean"] < 0.26
    with Job(tmp_path / "run", *settings, "train.steps=3", "checkpoint.every=1", "train.resume=true") as job:
        assert job.end() == 0, job.output()
        assert [line["step"] for line in job.metrics()] == [0, 1, 2]


def test_quantized_servers_are_refused_if_pushes_are_not_quantized(encoded: Path, tmp_path: Path):
    settings = (f"rollout.model_path={encoded}", "weights.encoding=fp8_channel", *ONE_RANK)
    with Job(tmp_path / "run", *settings) as job:
        assert job.end() == 2
        assert "embedded would start a server that holds weights as FP8 in blocks" in " ".join(job.output().split())
