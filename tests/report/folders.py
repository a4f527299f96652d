"""Small synthetic run folders."""

import json
from pathlib import Path
from typing import Any

CONFIG = {
    "objective": {"name": "espo", "alpha": 0.02},
    "train": {"seed": 0, "steps": 3, "resume": False},
    "optimizer": {"lr": 2e-4},
    "log": {"path": "x", "tokens": 2},
}


def metrics(step: int, **more: object) -> dict[str, Any]:
    """Return a line of metrics.jsonl."""
    return {
        "step": step,
        "reward_mean": 0.25 + 0.125 * step,
        "loss": -0.1,
        "entropy_mean": 0.5,
        "clipped_fraction": 0.125,
        "mismatch_p99": 1e-6,
        "mismatch_max": 4e-6,
        "seconds": {"rollout": 1.0, "train": 2.0, "fleet": 0.5, "total": 3.5},
        **more,
    }


def sample(name: str, text: list[str], advantage: float = 1.5, prompt: str = "2+2=") -> dict[str, Any]:
    """Return a response of two segments, the first token alone and the rest; the second segment is clipped."""
    count = len(text)
    return {
        "id": name,
        "prompt_id": "p",
        "prompt": prompt,
        "reward": 1.0,
        "advantage": advantage,
        "tokens": count,
        "text": text,
        "old": [-0.5] * count,
        "new": [-0.4] * count,
        "entropy": [0.25 * place for place in range(count)],
        "rollout": [-0.5 - 1e-6] * count,
        "all_segments": 2,
        "segment": [0] + [1] * (count - 1),
        "segments": {
            "tokens": [1.0, count - 1.0],
            "entropy": [0.0, 0.4],
            "ratio": [1.01, 1.105],
            "clipped": [0.0, 1.0],
            "low": [0.02, 0.03],
            "high": [0.02, 0.03],
        },
    }


def tokens(step: int, *samples: dict[str, Any]) -> dict[str, Any]:
    """Return a line of tokens.jsonl."""
    bins = {"segments": [400.0, 0.0, 800.0], "clipped": [100.0, 0.0, 400.0]}
    return {
        "step": step,
        "updates": 2,
        "by_length": {"edges": [1, 2], **bins},
        "by_entropy": {"edges": [0.1, 1.0], **bins},
        "samples": list(samples),
    }


def write_run(
    folder: Path,
    lines: list[dict[str, Any]] | None = None,
    recorded: list[dict[str, Any]] | None = None,
    **settings: object,
) -> Path:
    """Write a run folder; ``settings`` are ``section__key`` values over ``CONFIG``."""
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG))
    for key, value in settings.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    lines = [metrics(step) for step in range(3)] if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if recorded is not None:
        (folder / "tokens.jsonl").write_text("".join(json.dumps(line) + "\n" for line in recorded))
    return folder
