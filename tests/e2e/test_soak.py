"""200 steps of the demo with a lag, a server killed every 10 steps: it learns as ever and leaves nothing behind.

tools/check -m slow -k soak
"""

import os
import random
import re
import socket
from urllib.parse import urlparse

import pytest

from megatron_rl.rollout.buffer import TRAINED
from tests.e2e.job import ONE_RANK, Job, metrics_of
from tests.e2e.ledger import audit

STEPS, EVERY = 200, 10
DEMO_SIZES = (
    *ONE_RANK,
    f"train.steps={STEPS}",
    "train.prompts_per_step=32",
    "train.group_size=8",
    "train.updates_per_step=4",
    "rollout.sampling.max_new_tokens=40",
    "evaluate.every=50",
    "checkpoint.every=50",
    "rollout.max_lag=1",
    "rollout.sequences_per_server=64",
    "rollout.servers=2",
    "correction.kind=tis",
)
LEAST_ACCURACY = 0.94
"""Undisturbed runs of 60 steps, synchronous, lie between 0.941 and 0.970: docs/accuracy.md."""


def listens(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((urlparse(url).hostname, urlparse(url).port)) == 0


def shared_memory_of(pids: set[str]) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if pids & set(re.findall(r"\d+", name))]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_soak(tmp_path, capsys, monkeypatch):
    folder, dice = tmp_path / "run", random.Random(0)
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    urls: set[str] = set()
    open_files: list[int] = []
    kills = 0
    with Job(folder, *DEMO_SIZES) as job:
        for steps in range(EVERY, STEPS, EVERY):
            job.until_steps(steps)
            alive = job.until(job.servers).servers()
            urls |= {f"http://127.0.0.1:{p.cmdline()[p.cmdline().index('--port') + 1]}" for p in alive}
            dice.choice(alive).kill()
            kills += 1
            open_files.append(job.ranks()[0].num_fds())
        assert job.end() == 0, job.output()  # and no process is left
        left = job.output().count("left the fleet")
    steps = metrics_of(folder)
    accuracies = [line["accuracy"] for line in steps if "accuracy" in line]
    fates = audit(folder, 32, 1)
    with capsys.disabled():
        print(f"\n{kills} kills, left {left} times; accuracy {accuracies}; groups {dict(fates)}")
        print(f"largest lag {max(line['lag_max'] for line in steps if 'lag_max' in line)}; open files {open_files}")
    assert fates[TRAINED] == 32 * STEPS
    assert accuracies[-1] >= LEAST_ACCURACY
    assert left <= 2 * kills
    assert len(urls) == 2
    assert not [url for url in urls if listens(url)]
    assert max(open_files[-3:]) <= max(open_files[:3]) + 8  # connections that are open at the moment
    # torch keeps compiled kernels for its next run, in one place a user
    assert [path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor_")] == []
    assert shared_memory_of({str(process.pid) for process in job.seen}) == []
    assert len(list((folder / "checkpoints").glob("*"))) == 2
