"""The run folder: the files written before the first step, and the lines removed when a run resumes."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_rl.config.load import to_json
from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.observability.file_names import CONFIG, HISTORY, METRICS, VERSIONS
from megatron_rl.util.atomic import replace_text, replaced


def prepare_folder(run: Run, versions: Mapping[str, str | None], step: int = 0) -> list[str]:
    """Create the run folder with ``config.json`` and ``versions.json``; return the settings that a resumed run changes.

    Args:
        run: the configuration.
        versions: software versions.
        step: the first step; ``history.jsonl`` has the settings and versions that change there, old and new.

    Raises:
        ConfigError: the folder holds a run and ``train.resume`` is off, or it cannot be written.
    """
    folder = Path(run.log.path)
    config = folder / CONFIG
    if _holds_a_run(folder) and not run.train.resume:
        raise ConfigError(
            f"{folder} holds a run already (log.path); `megatron-rl train {folder}` or"
            " train.resume=true continues it; or write another log.path"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = json.loads(config.read_text()) if config.exists() else None
        old_versions = _read_versions(folder / VERSIONS)
        changed = {} if before is None or not run.train.resume else dict(_changes(before, json.loads(to_json(run))))
        if changed or (run.train.resume and old_versions not in (None, versions)):
            found = dict(_changes(old_versions or {}, versions))
            line = {"step": step, "settings": changed, "versions": found}
            with (folder / HISTORY).open("a", encoding="utf-8") as history:
                history.write(json.dumps(line) + "\n")
        replace_text(config, to_json(run))
        replace_text(folder / VERSIONS, json.dumps(versions, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write the run folder {folder} (log.path): {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{config} is not JSON: {error}; delete it and resume again") from error
    return [f"{key}: {json.dumps(old)} -> {json.dumps(new)}" for key, (old, new) in changed.items()]


def _read_versions(path: Path) -> Mapping[str, object] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _holds_a_run(folder: Path) -> bool:
    """Return whether a step was finished in this folder; a run that failed earlier may be started again in it."""
    metrics = folder / METRICS
    return (metrics.exists() and metrics.stat().st_size > 0) or any((folder / "checkpoints").glob("step_*"))


def _changes(
    before: Mapping[str, object], after: Mapping[str, object], prefix: str = ""
) -> Iterator[tuple[str, tuple[object, object]]]:
    """Yield the dotted names of changed entries, each with its old and its new value."""
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changes(old, new, f"{prefix}{name}.")
        elif old != new and f"{prefix}{name}" != "train.resume":
            yield f"{prefix}{name}", (old, new)


def keep_steps_before(path: Path, step: int) -> None:
    """Remove the JSON lines of this step and later steps, and lines that a crash left incomplete or full of NULs."""
    if not path.exists():
        return
    with path.open("rb") as lines, replaced(path) as output:
        for line in lines:
            found = _step_of(line)
            if found is not None and found < step:
                output.write(line)


def _step_of(line: bytes) -> int | None:
    """Return the step of a JSON line; None if the line is incomplete or no JSON."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, LookupError, TypeError):
        return None
    return step if isinstance(step, int) else None
