"""Diagnoses hangs: which rank has not entered which collective, and where it is instead.

    no collective is entered or left for the limit  ->  a rank writes a file "asked" to RUN/hang
    every rank's watchdog sees the file             ->  writes its ledger of collectives and its stacks next to it
    the lowest rank that answered                   ->  compares them, writes report.txt and prints it
    all ranks                                       ->  end with ``HUNG``, so that Slurm can requeue the job

The ranks communicate through the run folder, because their process groups hang.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rl.distributed.ledger import CollectiveCall, record_collectives
from megatron_rl.distributed.mesh import World
from megatron_rl.util.atomic import replace_text
from megatron_rl.util.exit_codes import HUNG

CHECK_SECONDS = 1.0
"""Seconds between two checks of the ledger and the run folder."""

ANSWER_SECONDS = 15.0
"""Seconds that the ranks have to write their answers."""


class Watchdog:
    """Watches one rank in a separate thread, as a context manager.

    Args:
        folder: ``RUN/hang``, on a file system that all ranks share.
        world: this rank.
        limit_seconds: the time without progress that counts as a hang.
    """

    def __init__(self, folder: Path, world: World, limit_seconds: float) -> None:
        self._folder, self._rank, self._size, self._limit = folder, world.rank, world.size, limit_seconds
        self._ledger = record_collectives()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._asked_before = self._asked()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _asked(self) -> float:
        try:
            return (self._folder / "asked").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _watch(self) -> None:
        seen, since = self._ledger.progress, time.monotonic()
        interval = min(CHECK_SECONDS, self._limit / 4)
        while not self._end.wait(interval):
            if self._ledger.progress != seen:
                seen, since = self._ledger.progress, time.monotonic()
            if self._ledger.waiting() and time.monotonic() - since > self._limit:
                self._folder.mkdir(parents=True, exist_ok=True)
                (self._folder / "asked").write_text(f"rank {self._rank}\n")
            if self._asked() > self._asked_before:
                self._answer()

    def _answer(self) -> None:
        """Write this rank's answer, write the report or wait for it, and end the process."""
        answers = self._folder / f"answers-{self._asked():.0f}"
        answers.mkdir(exist_ok=True)
        mine = {"ledger": self._ledger.as_json(), "stack": stacks()}
        replace_text(answers / f"rank_{self._rank}.json", json.dumps(mine))
        deadline, found = time.monotonic() + ANSWER_SECONDS, 0
        while found < self._size and time.monotonic() < deadline:
            time.sleep(0.1)
            found = len(list(answers.glob("rank_*.json")))
        answered = sorted(int(path.stem.partition("_")[2]) for path in answers.glob("rank_*.json"))
        if answered[0] == self._rank:
            text = hang_report(_read(answers, answered), self._size, self._limit)
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


def hang_report(answers: Mapping[int, tuple[Sequence[CollectiveCall], str]], size: int, limit_seconds: float) -> str:
    """Return a description of a hang.

    Args:
        answers: rank -> its latest collectives and its stacks.
        size: number of ranks.
        limit_seconds: the time without progress.
    """
    lines = [f"megatron-rl: no collective was entered or left for {limit_seconds:g} s; the run ends with code {HUNG}"]
    silent = [rank for rank in range(size) if rank not in answers]
    if silent:
        lines.append(f"  no answer from rank {', '.join(map(str, silent))}: dead, stopped, or busy outside of Python")
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


def _read(folder: Path, ranks: Sequence[int]) -> dict[int, tuple[list[CollectiveCall], str]]:
    found = {}
    for rank in ranks:
        answer = json.loads((folder / f"rank_{rank}.json").read_text())
        found[rank] = ([CollectiveCall(**entry) for entry in answer["ledger"]], answer["stack"])
    return found
