"""Training checkpoints: the exact state in pieces, written while training goes on, whole or not at all.

    RUN/checkpoints/step_00000020/meta.json      step, layout, sizes, checksums
                                  index.json     where every piece of every tensor belongs, and its checksum
                                  sampler.json   what the sampler must know: prompts taken
                                  config.json, tokenizer.json, ...   those of the model
                                  rank_00000.safetensors   pieces that this rank held: weights, moments, generators

A checkpoint resumes under any layout, and bit for bit under the layout that wrote it.
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

from megatron_rl.config.schema import Run
from megatron_rl.distributed.collectives import broadcast_json
from megatron_rl.distributed.host_copies import HostCopies
from megatron_rl.distributed.mesh import World
from megatron_rl.errors import DataError, TrainingError
from megatron_rl.models.checkpoint_folders import copy_companions
from megatron_rl.models.sharded_files import StateSlice, index_json, parse_index, write_slices
from megatron_rl.models.training_checkpoint import (
    INDEX,
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
"""Between looks for the files of other ranks."""


class Checkpoints:
    """Writes, keeps and reads the checkpoints of one run folder. Every method but ``is_due`` is collective."""

    def __init__(self, run: Run, world: World, policy: Policy) -> None:
        self.folder = checkpoint_folder(run)
        self.settings, self.run, self.world, self.policy = run.checkpoint, run, world, policy
        self.layout = layout_record(run, world.size)
        self._copies = HostCopies()
        self._writing: list[Future[None]] = []

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint or an export is due after this many steps."""
        return _divides(self.settings.every, step) or _divides(self.settings.export_every, step)

    def write_due(self, step: int, sampler_state: JSON | None) -> None:
        """Write what is due after ``step`` rollout batches."""
        if _divides(self.settings.every, step):
            self.save(step, sampler_state)
        if _divides(self.settings.export_every, step):
            export_hf(self.policy, self.run, Path(self.run.log.path) / "exports" / checkpoint_name(step))

    def save(self, step: int, sampler_state: JSON | None) -> None:
        """Copy the state after ``step`` rollout batches and begin to write it; an earlier one is finished first.

        ``sampler_state`` is the main rank's; what the others give is not read.

        Raises:
            TrainingError: a checkpoint cannot be written, on whatever rank.
        """
        self.finish()
        final, beside = self.folder / checkpoint_name(step), None
        if self.world.is_main and not final.exists():
            beside = self._begin(final)
        # What exists already is the one that the run was resumed from, when it is asked to stop before its first step.
        words = broadcast_json(beside and str(beside), source=0, device=self.world.device)
        if words is None:
            return
        beside = Path(str(words))
        pieces = self._copies.take(self.policy.sharded_state())
        meta = CheckpointMeta(format=2, step=step, updates=self.policy.updates, layout=self.layout, bytes={}, sha256={})
        self._writing = [self._in_background(final, partial(_write_rank, beside, self.world.rank, pieces))]
        if self.world.is_main:
            finish = partial(_finish, beside, final, meta, json.dumps(sampler_state), Path(self.run.model.path))
            self._writing.append(self._in_background(final, lambda: (finish(), self._drop_old())))
        if not self.settings.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Return when what this rank has to write is on the disk; on the main rank, when the checkpoint is complete.

        Raises:
            TrainingError: it cannot be written.
        """
        for writing in self._writing:
            writing.result()
        self._writing = []

    def load(self) -> tuple[int, JSON | None]:
        """Restore the newest checkpoint; return how many rollout batches it has seen, and the sampler's state.

        Without a checkpoint: 0 and nothing.

        Raises:
            DataError: a file is missing or was changed, or it is of another model.
        """
        newest = newest_checkpoint(self.run)
        if newest is None:
            return 0, None
        meta = read_meta(newest)
        sampler_state = json.loads(read_checked(newest, SAMPLER, meta))
        reader = open_sharded_state(newest, meta)
        try:
            self.policy.load_sharded_state(reader, meta.updates, same_layout=meta.layout == self.layout)
        except DataError as error:
            raise DataError(f"{error}; {repair_hint(newest)}") from error
        return meta.step, sampler_state

    def _begin(self, final: Path) -> Path:
        try:
            clear_leftovers(self.folder)
            return begin_folder(final)
        except OSError as error:
            raise self._cannot_write(final, error) from error

    def _in_background(self, final: Path, work: Callable[[], object]) -> Future[None]:
        """Do the work in a thread that ends with this process; the future tells how it went."""
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

    def _drop_old(self) -> None:
        """Delete checkpoints beyond ``checkpoint.keep``, but for those that ``checkpoint.keep_every`` keeps."""
        for old in valid_checkpoints(self.folder)[: -self.settings.keep]:
            if not _divides(self.settings.keep_every, step_of(old)):
                remove_folder(old)


def _write_rank(beside: Path, rank: int, pieces: Sequence[tuple[StateSlice, Tensor]]) -> None:
    """Write this rank's file, then its part of the index, whose presence says that the file is whole."""
    index = index_json(write_slices(beside, rank, pieces))
    replace_text(beside / f"rank_{rank:05}.json", index)


def _finish(beside: Path, final: Path, meta: CheckpointMeta, sampler_state: str, model: Path) -> None:
    """Wait for all ranks' files, which may come from other machines, and make the checkpoint of them."""
    parts = [beside / f"rank_{rank:05}.json" for rank in range(int(str(meta.layout["ranks"])))]
    while not all(part.exists() for part in parts):
        time.sleep(POLL_SECONDS)
    pieces = list(chain.from_iterable(parse_index(part.read_bytes(), part) for part in parts))
    for part in parts:
        part.unlink()
    copy_companions(model, beside)
    texts = {INDEX: index_json(pieces), SAMPLER: sampler_state}
    for name, text in texts.items():
        (beside / name).write_text(text, encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(beside.iterdir())}
    digests = {name: sha256(text.encode()).hexdigest() for name, text in texts.items()}
    described = meta.model_copy(update={"bytes": sizes, "sha256": digests})
    described = described.model_copy(update={"digest": described.computed_digest()})
    (beside / META).write_text(described.model_dump_json(indent=2) + "\n")
    commit_folder(beside, final)


def _divides(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
