"""Diagnoses hangs: which rank has not entered which collective, and where it is instead.

    a rank waits in a collective, none is entered or finishes for the limit, and the main rank announces no wait that
    makes progress                          ->  the rank sets the key "asked" in the store of torch.distributed
    every rank's watchdog sees the key      ->  writes its ledger of collectives and its stacks to RUN/hang
    the lowest rank that answered           ->  compares them, writes report.txt and prints it
    all ranks                               ->  end with ``HUNG``, so that Slurm can requeue the job

Each watchdog has a connection of its own to the store, because the process groups hang and the main thread may wait in
the other one. Where the store does not answer, because the main rank is dead or stopped, a rank that waits too long
answers unasked. Files are written in a hang only: no watchdog polls the file system.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_rl.distributed.ledger import CollectiveCall, record_collectives
from megatron_rl.distributed.main_rank import STATE, connect_again, main_rank
from megatron_rl.distributed.mesh import World
from megatron_rl.util.atomic import replace_text
from megatron_rl.util.exit_codes import HUNG

CHECK_SECONDS = 1.0
"""Seconds between two checks of the ledger and the store."""

ANSWER_SECONDS = 15.0
"""Seconds that the ranks have to write their answers; also the longest that the store may take to answer."""

ASKED, STARTED = "megatron_rl/hang/asked", "megatron_rl/hang/started"
"""Keys of the store: which rank asked for a report, and the name of the folder for this run's answers."""


class Watchdog:
    """Watches one rank in a separate thread, as a context manager.

    Args:
        folder: ``RUN/hang``, on a file system that all ranks share.
        world: this rank.
        limit_seconds: the time without progress that counts as a hang.
    """

    def __init__(self, folder: Path, world: World, limit_seconds: float) -> None:
        self._folder, self._rank, self._size, self._limit = folder, world.rank, world.size, limit_seconds
        self._ledger, self._main = record_collectives(), main_rank()
        self._store: dist.Store | None = None
        self._answers = folder
        self._published = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._size > 1:  # a single rank waits for nobody
            self._store = connect_again()
            self._store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
            if self._rank == 0:
                self._store.set(STARTED, f"answers-{time.time():.0f}")
            self._answers = self._folder / self._store.get(STARTED).decode()
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        assert self._store is not None, "set before the thread starts"
        seen, since, state = (-1, ""), time.monotonic(), ""
        interval = min(CHECK_SECONDS, self._limit / 4)
        while not self._end.wait(interval):
            self._ledger.poll()
            with suppress(dist.DistError):
                state = self._main_rank_state(self._store)
            if seen != (now := (self._ledger.progress, state)):
                seen, since = now, time.monotonic()
            overdue = self._ledger.waiting() is not None and time.monotonic() - since > self._limit
            try:
                if overdue:
                    self._store.set(ASKED, f"rank {self._rank}")
                asked = self._store.check([ASKED])
            except dist.DistError:  # the main rank is dead or stopped, or at the end of a run gone already
                asked = overdue
            if asked:
                self._answer()

    def _main_rank_state(self, connection: dist.Store) -> str:
        """Return what the main rank waits for and its progress, as JSON; the main rank publishes it."""
        if self._rank == 0:
            wait = self._main.announced()
            state = "" if wait is None else wait.to_json()
            if state != self._published:
                connection.set(STATE, state)
                self._published = state
            return state
        return connection.get(STATE).decode() if connection.check([STATE]) else ""

    def _answer(self) -> None:
        """Write this rank's answer, write the report or wait for it, and end the process."""
        answers = self._answers
        answers.mkdir(parents=True, exist_ok=True)
        wait = self._main.announced()
        mine = {"ledger": self._ledger.as_json(), "stack": stacks(), "waits_for": None if wait is None else wait.reason}
        replace_text(answers / f"rank_{self._rank}.json", json.dumps(mine))
        deadline, found = time.monotonic() + ANSWER_SECONDS, 0
        while found < self._size and time.monotonic() < deadline:
            time.sleep(0.1)
            found = len(list(answers.glob("rank_*.json")))
        answered = sorted(int(path.stem.partition("_")[2]) for path in answers.glob("rank_*.json"))
        if answered[0] == self._rank:
            text = hang_report(*_read(answers, answered), self._size, self._limit)
            replace_text(self._folder / "report.txt", text)
            sys.stderr.write(text)  # not through the logger, whose lock a thread that hangs may hold
            sys.stderr.flush()
            replace_text(answers / "done", "")
        while not (answers / "done").exists() and time.monotonic() < deadline + ANSWER_SECONDS:
            time.sleep(0.1)
        os._exit(HUNG)


def stacks() -> str:
    """Return the stacks of all threads of this process except the watchdog's."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]
    return "\n".join(parts)


def hang_report(
    answers: Mapping[int, tuple[Sequence[CollectiveCall], str]],
    waits: Mapping[int, str],
    size: int,
    limit_seconds: float,
) -> str:
    """Return a description of a hang.

    Args:
        answers: rank -> its latest collectives and its stacks.
        waits: rank -> what it announced to wait for, without progress.
        size: number of ranks.
        limit_seconds: the time without progress.
    """
    lines = [
        f"megatron-rl: no collective was entered or finished for {limit_seconds:g} s; the run ends with code {HUNG}"
    ]
    silent = [rank for rank in range(size) if rank not in answers]
    if silent:
        lines.append(f"  no answer from rank {', '.join(map(str, silent))}: dead, stopped, or busy outside of Python")
    lines += [f"  rank {rank} waits for {reason}, which makes no progress" for rank, reason in waits.items()]
    missing = missing_ranks(answers)
    lines += [f"  {text}" for text in missing.values()]
    if not silent and not missing:
        lines.append("  every rank has entered the same collectives: the network or a GPU does not finish one")
    for rank, (entries, _) in answers.items():
        inside = next((entry for entry in reversed(entries) if not entry.left), None)
        lines.append(f"  rank {rank} " + (f"waits in {inside.describe()}" if inside else "is in no collective"))
    for rank in missing or answers:
        lines += [
            f"-- rank {rank}, {line}" if line.startswith("thread") else line for line in answers[rank][1].split("\n")
        ]
    return "\n".join(lines) + "\n"


def missing_ranks(answers: Mapping[int, tuple[Sequence[CollectiveCall], str]]) -> dict[int, str]:
    """Return a message for each rank that others wait for: the collective that it has not entered."""
    newest: dict[str, dict[int, CollectiveCall]] = defaultdict(dict)
    for rank, (entries, _) in answers.items():
        for entry in entries:
            newest[entry.group][rank] = entry
    found: dict[int, str] = {}
    for by_rank in newest.values():
        latest = max(by_rank.values(), key=lambda entry: entry.number)
        for rank in latest.ranks:
            number = by_rank[rank].number if rank in by_rank else 0
            if rank in answers and number < latest.number and not latest.left:
                last = f"its last of that group was number {number}"
                found[rank] = f"rank {rank} has not entered {latest.describe()}; {last}"
    return found


def _read(folder: Path, ranks: Sequence[int]) -> tuple[dict[int, tuple[list[CollectiveCall], str]], dict[int, str]]:
    """Return the answers of these ranks, and what they announced to wait for."""
    found: dict[int, tuple[list[CollectiveCall], str]] = {}
    waits: dict[int, str] = {}
    for rank in ranks:
        answer = json.loads((folder / f"rank_{rank}.json").read_text())
        found[rank] = ([CollectiveCall(**entry) for entry in answer["ledger"]], answer["stack"])
        if answer["waits_for"] is not None:
            waits[rank] = answer["waits_for"]
    return found, waits
