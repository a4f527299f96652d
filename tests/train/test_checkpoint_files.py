"""Checkpoints as files: whole or not at all, whatever ends the writer; damage is told, never loaded."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rl.algorithms.entropy import EntropyBonus
from megatron_rl.algorithms.objectives import R2VPO
from megatron_rl.algorithms.state import LossState
from megatron_rl.errors import DataError, TrainingError
from megatron_rl.models.sharded_files import ShardedStateReader, parse_index
from megatron_rl.models.training_checkpoint import INDEX, LOSS, META, SAMPLER, valid_checkpoints
from megatron_rl.train import checkpoints as module
from megatron_rl.train.resume import checkpoint_name, newest_checkpoint
from tests.train.small import small

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread")]

KILLS = 20


def write_for_ever(folder: Path, store: Path, rank: int, size: int) -> None:
    """Go on from the newest checkpoint, check it, and write one after another until killed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=size)
    policy, checkpoints = small(folder, rank, size, keep=2)
    step, _ = checkpoints.load()
    assert step == policy.updates
    while True:
        policy.train()
        checkpoints.save(policy.updates, {"next_prompt": policy.updates})


def check_all(folder: Path, size: int) -> int:
    """Load every checkpoint that looks like one, on every rank; return the step of the newest, 0 without one."""
    newest = 0
    for checkpoint in valid_checkpoints(folder / "checkpoints"):
        alone = folder.parent / "alone"
        shutil.copytree(checkpoint, alone / "checkpoints" / checkpoint.name)
        for rank in range(size):
            policy, checkpoints = small(alone, rank, size)
            newest, state = checkpoints.load()
            assert (checkpoint_name(newest), newest) == (checkpoint.name, policy.updates)
            assert state == {"next_prompt": newest}
        shutil.rmtree(alone)
    return newest


@pytest.mark.parametrize("size", [1, 2])
def test_a_kill_at_any_moment_leaves_the_last_good_checkpoint(tmp_path, size):
    moments, folder = random.Random(size), tmp_path / "run"
    context, reached = multiprocessing.get_context("fork"), [0]
    interrupted = 0
    for kill in range(KILLS):
        arguments = [(folder, tmp_path / f"store_{kill}", rank, size) for rank in range(size)]
        writers = [context.Process(target=write_for_ever, args=words) for words in arguments]
        for writer in writers:
            writer.start()
        begun = time.monotonic()
        while check_newest(folder) <= reached[-1] and time.monotonic() < begun + 60:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.2))
        for writer in moments.sample(writers, size):
            assert writer.is_alive()
            os.kill(writer.pid or 0, signal.SIGKILL)
            time.sleep(moments.uniform(0, 0.02))
        for writer in writers:
            writer.join()
        interrupted += any((folder / "checkpoints").glob(".*"))
        reached.append(check_all(folder, size))
        assert reached[-1] > reached[-2]
        assert len(valid_checkpoints(folder / "checkpoints")) <= 3  # keep = 2, and one that was to be dropped
    assert interrupted > KILLS / 2, "the kills hardly met a write"


def check_newest(folder: Path) -> int:
    """Return the step of the newest checkpoint, 0 without one."""
    found = valid_checkpoints(folder / "checkpoints")
    return int(found[-1].name.removeprefix("step_")) if found else 0


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    gate, write = threading.Event(), module.write_slices

    def slow(*arguments):
        gate.wait(60)
        return write(*arguments)

    monkeypatch.setattr(module, "write_slices", slow)
    policy, checkpoints = small(tmp_path)
    policy.train()
    checkpoints.save(1, {})
    policy.train()  # overwrites every tensor
    assert valid_checkpoints(tmp_path / "checkpoints") == []
    gate.set()
    checkpoints.finish()
    again, other = small(tmp_path)
    assert other.load() == (1, {})
    assert again.updates == 1  # and every element with it, as load_sharded_state checks


def test_without_asynchronous_a_save_returns_when_all_is_written(tmp_path):
    policy, checkpoints = small(tmp_path, asynchronous=False)
    checkpoints.save(policy.updates, {})
    assert [path.name for path in valid_checkpoints(tmp_path / "checkpoints")] == [checkpoint_name(0)]


def test_the_newest_are_kept_and_every_tenth_for_good(tmp_path):
    policy, checkpoints = small(tmp_path, keep=2, keep_every=10)
    for _ in range(23):
        policy.train()
        checkpoints.save(policy.updates, {})
    checkpoints.finish()
    kept = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert kept == [checkpoint_name(step) for step in (10, 20, 22, 23)]


def test_a_disk_that_is_full_is_one_error_and_costs_no_older_checkpoint(tmp_path, monkeypatch):
    policy, checkpoints = small(tmp_path)
    policy.train()
    checkpoints.save(1, {})
    checkpoints.finish()

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_slices", full)
    checkpoints.save(2, {})
    with pytest.raises(TrainingError, match=r"step_00000002 cannot be written: .*No space left.*complete one is .*1$"):
        checkpoints.finish()
    assert small(tmp_path)[1].load() == (1, {})


def test_the_numbers_that_a_loss_adapts_come_back_exactly(tmp_path):
    policy, checkpoints = small(tmp_path, asynchronous=False)
    checkpoints.save(policy.updates, {})
    assert not list((tmp_path / "checkpoints").rglob(LOSS))  # most losses have none
    policy.train()
    checkpoints.loss_state = LossState(R2VPO(), EntropyBonus(target_fraction=0.5))
    checkpoints.loss_state.restore({"multiplier": 0.1 + 0.2, "initial_entropy": 1 / 3})
    checkpoints.save(policy.updates, {})
    _, other = small(tmp_path)
    other.loss_state = LossState(R2VPO(), EntropyBonus(target_fraction=0.5))
    assert other.load() == (1, {})
    assert other.loss_state.values == checkpoints.loss_state.values
    newest = newest_checkpoint(other.run)
    assert newest is not None
    (newest / LOSS).write_text((newest / LOSS).read_text().replace("0.3", "0.4"))
    with pytest.raises(DataError, match=r"loss\.json was modified"):
        other.load()


@pytest.fixture
def written(tmp_path) -> Path:
    policy, checkpoints = small(tmp_path, asynchronous=False)
    for _ in range(2):
        policy.train()
        checkpoints.save(policy.updates, {"next_prompt": 9})
    found = newest_checkpoint(checkpoints.run)
    assert found is not None
    return found


def load(checkpoint: Path) -> tuple[int, object]:
    return small(checkpoint.parent.parent)[1].load()


def error_of(checkpoint: Path) -> str:
    """Load the newest checkpoint; return the error, or nothing if all that was written came back."""
    try:
        assert load(checkpoint) == (2, {"next_prompt": 9})
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", [META, INDEX, SAMPLER, "rank_00000.safetensors"])
def test_damage_is_an_error_that_names_the_file_and_the_older_checkpoint(written, name):
    path, moments = written / name, random.Random(0)
    whole = path.read_bytes()
    told = 0
    for _ in range(60):
        damaged = bytearray(whole)
        place = moments.choice([moments.randrange(len(whole)), moments.randrange(min(len(whole), 400))])
        if moments.random() < 0.5:
            damaged[place] ^= 1 << moments.randrange(8)
        else:
            del damaged[place:]
        path.write_bytes(damaged)
        said = error_of(written)
        if said:
            assert str(path) in said
            assert said.endswith(f"to continue from {written.with_name(checkpoint_name(1))}")
            told += 1
    assert told > 50  # the others changed a space of JSON, or nothing that is read
    path.unlink()
    if name == META:
        assert load(written)[0] == 1
    else:
        with pytest.raises(DataError, match=f"{name} is missing"):
            load(written)


def test_a_file_from_another_checkpoint_is_not_taken(written):
    name = "rank_00000.safetensors"
    shutil.copy(written.with_name(checkpoint_name(1)) / name, written / name)
    with pytest.raises(DataError, match=f"{name} was modified: model/a has other"):
        load(written)


@pytest.mark.parametrize("file", ["../../elsewhere.safetensors", "/etc/passwd", "rank_1.safetensors/../x"])
def test_an_index_cannot_lead_out_of_the_folder(written, file):
    pieces = json.loads((written / INDEX).read_text())
    with pytest.raises(DataError, match=r"is not a valid index: String should match pattern"):
        parse_index(json.dumps([{**pieces[0], "file": file}]), written / INDEX)


@pytest.mark.parametrize(("change", "says"), [("gap", "leave a gap"), ("twice", "inconsistent"), ("shape", "is ")])
def test_slices_must_cover_the_tensor(written, change, says):
    (piece,) = (p for p in json.loads((written / INDEX).read_text()) if p["tensor"] == "model/a")
    pieces = {
        "gap": [{**piece, "start": 5}],
        "twice": [piece, {**piece, "shape": [5]}],
        "shape": [{**piece, "shape": [300_000, 1]}],
    }[change]
    found = parse_index(json.dumps(pieces), written / INDEX)
    policy, _ = small(written.parent.parent)
    with pytest.raises(DataError, match=says):
        policy.load_sharded_state(ShardedStateReader(written, found), 2, same_layout=True)
