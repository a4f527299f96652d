"""Training checkpoints: the exact state of a run, written atomically while training continues.

    RUN/checkpoints/step_00000020/meta.json      step, layout, sizes, checksums
                                  index.json     position and checksum of every slice of every tensor
                                  sampler.json   state of the rollouts: position in the prompt stream, groups
                                  loss.json      numbers that the loss adapts, if it has any
                                  config.json, tokenizer.json, ...   files of the model
                                  rank_00000.safetensors   slices of one rank: weights, moments, random generators

A checkpoint can be resumed with any layout, and bit for bit with the layout that wrote it.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from megatron_rl.algorithms.state import LossState
from megatron_rl.config.schema import Run
from megatron_rl.distributed.collectives import broadcast_json
from megatron_rl.distributed.host_copies import HostCopies
from megatron_rl.distributed.mesh import World
from megatron_rl.errors import DataError, TrainingError
from megatron_rl.models.checkpoint_folders import companion_files, copy_companions
from megatron_rl.models.sharded_files import StateSlice, index_json, parse_index, write_slices
from megatron_rl.models.training_checkpoint import (
    INDEX,
    LOSS,
    META,
    SAMPLER,
    CheckpointMeta,
    open_sharded_state,
    read_checked,
    read_meta,
    repair_hint,
    step_of,
    valid_checkpoints,
)
from megatron_rl.policy.engine import Policy
from megatron_rl.train.export import export_hf
from megatron_rl.train.resume import checkpoint_folder, checkpoint_name, layout_record, newest_checkpoint
from megatron_rl.util.atomic import begin_folder, clear_leftovers, commit_folder, remove_folder, replace_text

JSON = Mapping[str, object]
POLL_SECONDS = 0.05
"""Seconds between two checks for the files of other ranks."""


class Checkpoints:
    """Writes, deletes and reads the checkpoints of a run folder. All methods but ``is_due`` are collective."""

    def __init__(self, run: Run, world: World, policy: Policy, loss_state: LossState | None = None) -> None:
        self.folder = checkpoint_folder(run)
        self.settings, self.run, self.world, self.policy = run.checkpoint, run, world, policy
        self.layout = layout_record(run, world.size)
        self.loss_state = loss_state or LossState()
        self._copies = HostCopies()
        self._writing: list[Future[None]] = []

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint or an export is due after ``step`` rollout batches."""
        return _divides(self.settings.every, step) or _divides(self.settings.export_every, step)

    def write_due(self, step: int, rollout_state: JSON | None) -> None:
        """Write the checkpoint and the export that are due after ``step`` rollout batches."""
        if _divides(self.settings.every, step):
            self.save(step, rollout_state)
        if _divides(self.settings.export_every, step):
            export_hf(self.policy, self.run, Path(self.run.log.path) / "exports" / checkpoint_name(step))

    def save(self, step: int, rollout_state: JSON | None) -> None:
        """Copy the state after ``step`` rollout batches and start to write it, after an earlier write has finished.

        Args:
            step: number of rollout batches.
            rollout_state: the state of the rollouts; only that of the main rank is used.

        Raises:
            TrainingError: a checkpoint cannot be written on some rank.
        """
        self.finish()
        final, temporary = self.folder / checkpoint_name(step), None
        # It exists if the run was resumed from it and is stopped before its first step.
        if self.world.is_main and not final.exists():
            temporary = self._begin(final)
        path = broadcast_json(temporary and str(temporary), source=0, device=self.world.device)
        if path is None:
            return
        temporary = Path(str(path))
        slices = self._copies.take(self.policy.sharded_state())
        meta = CheckpointMeta(format=2, step=step, updates=self.policy.updates, layout=self.layout, bytes={}, sha256={})
        self._writing = [self._in_background(final, partial(_write_rank, temporary, self.world.rank, slices))]
        if self.world.is_main:
            texts = {SAMPLER: json.dumps(rollout_state)}
            if self.loss_state.values:
                texts[LOSS] = json.dumps(self.loss_state.values)
            finish = partial(_finish, temporary, final, meta, texts, Path(self.run.model.path))
            self._writing.append(self._in_background(final, lambda: (finish(), self._delete_old())))
        if not self.settings.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait until this rank's files are written; on the main rank, until the checkpoint is complete.

        Raises:
            TrainingError: the checkpoint cannot be written.
        """
        for writing in self._writing:
            writing.result()
        self._writing = []

    def load(self) -> tuple[int, JSON | None]:
        """Restore the newest checkpoint; return its number of rollout batches and its rollout state.

        Without a checkpoint the result is 0 and None. The numbers that the loss adapts are restored in ``loss_state``.

        Raises:
            DataError: a file is missing or changed, or the checkpoint is of another model.
        """
        newest = newest_checkpoint(self.run)
        if newest is None:
            return 0, None
        meta = read_meta(newest)
        rollout_state = json.loads(read_checked(newest, SAMPLER, meta))
        if LOSS in meta.sha256:
            self.loss_state.restore(json.loads(read_checked(newest, LOSS, meta)))
        reader = open_sharded_state(newest, meta)
        try:
            self.policy.load_sharded_state(reader, meta.updates, same_layout=meta.layout == self.layout)
        except DataError as error:
            raise DataError(f"{error}; {repair_hint(newest)}") from error
        return meta.step, rollout_state

    def _begin(self, final: Path) -> Path:
        try:
            clear_leftovers(self.folder)
            return begin_folder(final)
        except OSError as error:
            raise self._cannot_write(final, error) from error

    def _in_background(self, final: Path, work: Callable[[], object]) -> Future[None]:
        """Run ``work`` in a daemon thread; return a future of its completion."""
        future: Future[None] = Future()

        def run() -> None:
            try:
                work()
                future.set_result(None)
            except (OSError, SafetensorError) as error:
                future.set_exception(self._cannot_write(final, error))
            except BaseException as error:
                future.set_exception(error)
                raise

        threading.Thread(target=run, name=final.name, daemon=True).start()
        return future

    def _cannot_write(self, final: Path, error: Exception) -> TrainingError:
        newest = newest_checkpoint(self.run)
        complete = f"the newest complete one is {newest}" if newest else "there is no complete one yet"
        return TrainingError(f"the checkpoint {final} cannot be written: {error}; {complete}")

    def _delete_old(self) -> None:
        """Delete all but the newest ``checkpoint.keep`` checkpoints and those of ``checkpoint.keep_every``."""
        for old in valid_checkpoints(self.folder)[: -self.settings.keep]:
            if not _divides(self.settings.keep_every, step_of(old)):
                remove_folder(old)


def _write_rank(temporary: Path, rank: int, slices: Sequence[tuple[StateSlice, Tensor]]) -> None:
    """Write this rank's file, then its part of the index, whose existence means that the file is complete."""
    index = index_json(write_slices(temporary, rank, slices))
    replace_text(temporary / f"rank_{rank:05}.json", index)


def _finish(temporary: Path, final: Path, meta: CheckpointMeta, states: Mapping[str, str], model: Path) -> None:
    """Wait for the files of all ranks, which may run on other machines, and complete the checkpoint."""
    parts = [temporary / f"rank_{rank:05}.json" for rank in range(int(str(meta.layout["ranks"])))]
    while not all(part.exists() for part in parts):
        time.sleep(POLL_SECONDS)
    slices = list(chain.from_iterable(parse_index(part.read_bytes(), part) for part in parts))
    for part in parts:
        part.unlink()
    copy_companions(model, temporary)
    texts = {INDEX: index_json(slices), **states}
    for name, text in texts.items():
        (temporary / name).write_text(text, encoding="utf-8")
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
    digests = {name: sha256(text.encode()).hexdigest() for name, text in texts.items()}
    companions = {str(path.relative_to(temporary)): path for path in companion_files(temporary)}
    digests |= {name: sha256(path.read_bytes()).hexdigest() for name, path in companions.items()}
    described = meta.model_copy(update={"bytes": sizes, "sha256": digests})
    described = described.model_copy(update={"digest": described.computed_digest()})
    (temporary / META).write_text(described.model_dump_json(indent=2) + "\n")
    commit_folder(temporary, final)


def _divides(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
