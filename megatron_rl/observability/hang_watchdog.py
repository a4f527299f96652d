"""A run that stands still says why: which rank did not come, to which collective, and where it is instead.

    no collective was entered or left for the limit  ->  a rank puts a file "asked" into RUN/hang
    every rank's watchdog sees it                    ->  writes its ledger and the stacks of its threads beside it
    the lowest rank that answered                    ->  compares, writes report.txt and prints it
    all                                              ->  end with ``HUNG``, so that Slurm can start the job again

The side channel is the run folder: ranks that hang cannot be asked through the groups that hang.
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

LOOK_SECONDS = 1.0
"""Between two looks at the ledger and the run folder."""

ANSWER_SECONDS = 15.0
"""How long ranks have to write what they know."""


class Watchdog:
    """Looks after one rank from a thread of its own; a context manager.

    Args:
        folder: ``RUN/hang``, seen by every rank.
        world: this rank and how many there are.
        limit_seconds: no progress for this long is a hang.
    """

    def __init__(self, folder: Path, world: World, limit_seconds: float) -> None:
        self._folder, self._rank, self._size, self._limit = folder, world.rank, world.size, limit_seconds
        self._ledger = record_collectives()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._folder.mkdir(parents=True, exist_ok=True)
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
        look = min(LOOK_SECONDS, self._limit / 4)
        while not self._end.wait(look):
            if self._ledger.progress != seen:
                seen, since = self._ledger.progress, time.monotonic()
            if self._ledger.waiting() and time.monotonic() - since > self._limit:
                (self._folder / "asked").write_text(f"rank {self._rank}\n")
            if self._asked() > self._asked_before:
                self._answer()

    def _answer(self) -> None:
        """Write what this rank knows, see to it that there is a report, and end the process."""
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
            text = report(_read(answers, answered), self._size, self._limit)
            replace_text(self._folder / "report.txt", text)
            sys.stderr.write(text)
            sys.stderr.flush()
            replace_text(answers / "done", "")
        while not (answers / "done").exists() and time.monotonic() < deadline + ANSWER_SECONDS:
            time.sleep(0.1)
        os._exit(HUNG)


def stacks() -> str:
    """Return where every thread of this process is, the watchdog left out."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]
    return "\n".join(parts)


def report(answers: Mapping[int, tuple[Sequence[CollectiveCall], str]], size: int, limit_seconds: float) -> str:
    """Return what is known of a hang, for people.

    Args:
        answers: by rank, its newest collectives and its stacks.
        size: how many ranks there are.
        limit_seconds: how long nothing moved.
    """
    lines = [f"megatron-rl: no collective has moved for {limit_seconds:g} s; the run ends with code {HUNG}"]
    silent = [rank for rank in range(size) if rank not in answers]
    if silent:
        lines.append(f"  no answer from rank {_listed(silent)}: dead, stopped, or busy outside of Python")
    behind = late(answers)
    lines += [f"  {text}" for text in behind.values()]
    if not silent and not behind:
        lines.append("  every rank has entered the same collectives: the network, or a GPU, does not finish one")
    for rank, (entries, _) in answers.items():
        inside = next((entry for entry in reversed(entries) if not entry.left), None)
        lines.append(f"  rank {rank} " + (f"waits in {inside.describe()}" if inside else "is in no collective"))
    for rank in behind or answers:
        lines += [
            f"-- rank {rank}, {line}" if line.startswith("thread") else line for line in answers[rank][1].split("\n")
        ]
    return "\n".join(lines) + "\n"


def late(answers: Mapping[int, tuple[Sequence[CollectiveCall], str]]) -> dict[int, str]:
    """Return for each rank that others wait for what it has not entered, in words."""
    newest: dict[str, dict[int, CollectiveCall]] = defaultdict(dict)
    for rank, (entries, _) in answers.items():
        for entry in entries:
            newest[entry.group][rank] = entry
    found: dict[int, str] = {}
    for by_rank in newest.values():
        ahead = max(by_rank.values(), key=lambda entry: entry.number)
        for rank in ahead.ranks:
            number = by_rank[rank].number if rank in by_rank else 0
            if rank in answers and number < ahead.number and not ahead.left:
                last = f"its last of that group was number {number}"
                found[rank] = f"rank {rank} has not entered {ahead.describe()}; {last}"
    return found


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _read(folder: Path, ranks: Sequence[int]) -> dict[int, tuple[list[CollectiveCall], str]]:
    found = {}
    for rank in ranks:
        answer = json.loads((folder / f"rank_{rank}.json").read_text())
        found[rank] = ([CollectiveCall(**entry) for entry in answer["ledger"]], answer["stack"])
    return found
