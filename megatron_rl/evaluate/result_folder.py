"""The folder of a result: what was asked, every sample as soon as it is verified, and the figures at the end.

evaluation.json   weights, task, sampling, prompts: two commands with the same are one evaluation, which goes on
samples.jsonl     one JSON object a sample; in the order of the prompts once all are there
result.json       the figures
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.load import to_json
from megatron_rl.config.schema import Run
from megatron_rl.data.types import Group, Prompt
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.observability.recorder import sample_record
from megatron_rl.tasks.base import Verdict
from megatron_rl.util.atomic import replace_text

EVALUATION, SAMPLES, RESULT = "evaluation.json", "samples.jsonl", "result.json"

Json = Mapping[str, object]


@dataclass(frozen=True)
class EvaluatedSample:
    """What the figures need of a sample."""

    prompt_id: str
    index: int
    prompt: str
    answer: str
    task: str
    difficulty: str
    correct: bool
    verified: bool
    read: str | None
    """The answer that it votes for."""
    truncated: bool
    tokens: int


def describe_evaluation(run: Run, step: int, prompts: Sequence[Prompt]) -> Json:
    """Return what decides the result of an evaluation, as JSON."""
    sampling = run.rollout.sampling.model_dump(mode="json") | {"temperature": run.evaluate.temperature}
    return {
        "weights": {"path": run.model.path, "step": step, "files": _files(Path(run.model.path))},
        "task": json.loads(to_json(run.task)),
        "reward": json.loads(to_json(run.reward)),
        "environment": json.loads(to_json(run.environment)),
        "prompts": len(prompts),
        "prompts_sha256": _digest(prompts),
        "samples": run.evaluate.samples,
        "sampling": sampling,
        "seed": run.train.seed,
        "engine": run.rollout.engine,
        "dtype": run.rollout.dtype or run.model.dtype,
    }


def _digest(prompts: Sequence[Prompt]) -> str:
    rows = [[prompt.id, list(prompt.input_ids), prompt.answer] for prompt in prompts]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _files(folder: Path) -> dict[str, list[int]]:
    """Return size and time of change of the files with weights: cheaper than a checksum of hundreds of gigabytes."""
    kinds = ("*.safetensors", "*.distcp", ".metadata")
    found = sorted(path for kind in kinds for path in folder.glob(kind))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in found}


class ResultFolder:
    """The folder of one result, new or begun."""

    def __init__(self, folder: Path, asked: Json, prompts: Sequence[Prompt]) -> None:
        """Make the folder, or go on in it.

        Raises:
            ConfigError: it holds another evaluation's result, or it cannot be written.
            DataError: two prompts have one id.
        """
        self.folder, self.prompts = folder, {prompt.id: number for number, prompt in enumerate(prompts)}
        self.samples_each = int(str(asked["samples"]))
        if len(self.prompts) < len(prompts):
            twice = next(prompt.id for number, prompt in enumerate(prompts) if self.prompts[prompt.id] != number)
            raise DataError(f"two held-out prompts have the id {twice!r}; a task must give each prompt its own")
        begun = read_description(folder) if (folder / EVALUATION).is_file() else None
        if begun is not None and begun != json.loads(json.dumps(asked)):
            changes = "; ".join(differences(begun, asked))
            raise ConfigError(f"{folder} holds another evaluation ({changes}); write another --output, or delete it")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(folder / EVALUATION, json.dumps(asked, indent=2) + "\n")
            self.done = self._keep_whole()
        except OSError as error:
            raise ConfigError(f"cannot write results to {folder}: {error.strerror}; write another --output") from error

    def missing(self) -> set[int]:
        """Return the places of the prompts whose samples are not all there."""
        return {place for prompt_id, place in self.prompts.items() if prompt_id not in self.done}

    def add(self, group: Group, verdicts: Sequence[Verdict], task: str) -> None:
        """Write the samples of a prompt."""
        prompt = group.prompt
        kind = {"task": prompt.metadata.get("task", task), "difficulty": prompt.metadata.get("difficulty", "")}
        lines = [
            {"index": response.index, **kind, **sample_record(prompt, response, verdict), "read": verdict.answer}
            for response, verdict in zip(group.responses, verdicts, strict=True)
        ]
        with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(_finite(line), allow_nan=False) + "\n" for line in lines))
        self.done.add(prompt.id)

    def finish(self) -> list[EvaluatedSample]:
        """Put the samples in the order of the prompts; return them."""
        rows = sorted(_rows(self.folder / SAMPLES), key=lambda row: (self.prompts[str(row["prompt_id"])], row["index"]))
        self._write(rows)
        return read_samples(self.folder)

    def _keep_whole(self) -> set[str]:
        """Drop the samples of prompts that were cut off; return the prompts that are whole."""
        rows = _rows(self.folder / SAMPLES)
        counts: dict[str, int] = {}
        for row in rows:
            counts[str(row["prompt_id"])] = counts.get(str(row["prompt_id"]), 0) + 1
        whole = {prompt_id for prompt_id, count in counts.items() if count == self.samples_each}
        self._write(row for row in rows if row["prompt_id"] in whole)
        return whole

    def _write(self, rows: Iterable[Json]) -> None:
        replace_text(self.folder / SAMPLES, "".join(json.dumps(row) + "\n" for row in rows))


def _finite(line: dict[str, object]) -> dict[str, object]:
    reward = line["reward"]
    return line if not isinstance(reward, float) or math.isfinite(reward) else {**line, "reward": None}


def _rows(file: Path) -> list[dict[str, object]]:
    """Return the whole lines of a file of samples; a last one that was cut off is left out."""
    if not file.is_file():
        return []
    lines = file.read_bytes().splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith(b"\n")]
    except ValueError as error:
        raise DataError(f"{file} has a line that is not JSON: {error}; delete the folder and evaluate again") from error


def read_description(folder: Path) -> Json:
    """Return what an evaluation asked.

    Raises:
        DataError: the folder holds no evaluation.
    """
    file = folder / EVALUATION
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{folder} holds no result: no {EVALUATION}; give a folder that eval has written") from error
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}; delete the folder and evaluate again") from error


def read_samples(folder: Path) -> list[EvaluatedSample]:
    """Return the samples of a result."""
    return [
        EvaluatedSample(
            prompt_id=str(row["prompt_id"]),
            index=int(str(row["index"])),
            prompt=str(row["prompt"]),
            answer=str(row["answer"]),
            task=str(row["task"]),
            difficulty=str(row["difficulty"]),
            correct=row["correct"] is True,
            verified=row["reward"] is not None,
            read=None if row["read"] is None else str(row["read"]),
            truncated=row["finish_reason"] == "length",
            tokens=int(str(row["tokens"])),
        )
        for row in _rows(folder / SAMPLES)
    ]


def differences(one: Json, other: Json, prefix: str = "") -> list[str]:
    """Return the entries in which two descriptions differ, in words; of the weights' files only that they do."""
    found: list[str] = []
    for name in dict.fromkeys([*one, *other]):
        before, after = one.get(name), other.get(name)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping) and name != "files":
            found += differences(before, after, f"{prefix}{name}.")
        elif name in ("files", "prompts_sha256"):
            found.append(f"{prefix}{name.partition('_')[0]} have changed")
        else:
            found.append(f"{prefix}{name}: {json.dumps(before)} -> {json.dumps(after)}")
    return found
