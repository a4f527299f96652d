"""Checks of a finished run's ``ledger.jsonl``."""

import json
from collections import Counter
from pathlib import Path

from megatron_rl.observability.file_names import LEDGER
from megatron_rl.rollout.buffer import FATES, TRAINED


def audit(folder: Path, prompts_per_step: int, max_lag: int) -> Counter[str]:
    """Return the number of groups per fate; every group must appear once, within the lag, and no step lacks one."""
    seen: set[str] = set()
    per_step: Counter[int] = Counter()
    fates: Counter[str] = Counter()
    for line in (folder / LEDGER).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        assert entry["group"] not in seen, line
        assert entry["fate"] in FATES, line
        if entry["fate"] == TRAINED and entry["lag"] is not None:
            assert 0 <= entry["lag"] <= max_lag, line
        seen.add(entry["group"])
        fates[entry["fate"]] += 1
        per_step[entry["step"]] += entry["fate"] == TRAINED
    assert dict(per_step) == dict.fromkeys(range(len(per_step)), prompts_per_step)
    return fates
