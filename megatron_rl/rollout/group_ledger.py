"""``ledger.jsonl``: what became of every group that was sampled to be trained on, one line each.

    {"step": 3, "group": "0.3/p17", "samples": 8, "fate": "trained", "lag": 1}

Its samples are ``group/0`` to ``group/7``. A line is written when the step takes or drops the group; a resumed run
drops the lines of the steps that it repeats. So no group stands here twice, and every step has the groups
that it asked for.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from megatron_rl.observability.file_names import LEDGER
from megatron_rl.rollout.buffer import FATES, NO_SIGNAL, TRAINED, FinishedGroup, StepBatch


def entries(step: int, taken: StepBatch, trained: Collection[int]) -> Iterator[Mapping[str, object]]:
    """Yield the lines of a step.

    Args:
        step: that takes the groups.
        taken: what it gets from the buffer.
        trained: which of the used groups are in its batch, by their place.
    """
    for place, held in enumerate(taken.used):
        yield _entry(step, held, TRAINED if place in trained else NO_SIGNAL)
    for dropped in taken.dropped:
        yield _entry(step, dropped.finished, dropped.fate)


def _entry(step: int, held: FinishedGroup, fate: str) -> Mapping[str, object]:
    oldest = held.group.oldest_version
    lag = None if oldest < 0 else step - oldest
    return {"step": step, "group": held.group.id, "samples": len(held.verdicts), "fate": fate, "lag": lag}


def audit(folder: Path, prompts_per_step: int, max_lag: int, filtered: bool = False) -> Counter[str]:
    """Return how many groups had which fate; raise if one is there twice, is too old, or is missing.

    Raises:
        ValueError: the first thing that is wrong, with its line.
    """
    seen: set[str] = set()
    per_step: Counter[int] = Counter()
    fates: Counter[str] = Counter()
    for line in (folder / LEDGER).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["group"] in seen:
            raise ValueError(f"a group stands twice in {folder / LEDGER}: {line}")
        if entry["fate"] not in FATES:
            raise ValueError(f"no such fate: {line}")
        if entry["fate"] == TRAINED and entry["lag"] is not None and not 0 <= entry["lag"] <= max_lag:
            raise ValueError(f"trained on although its lag is not within 0 and {max_lag}: {line}")
        seen.add(entry["group"])
        fates[entry["fate"]] += 1
        per_step[entry["step"]] += entry["fate"] == TRAINED
    for step in range(max(per_step, default=-1) + 1):
        if per_step[step] > prompts_per_step or (not filtered and per_step[step] < prompts_per_step):
            raise ValueError(f"step {step} trained on {per_step[step]} groups, not {prompts_per_step}")
    return fates
