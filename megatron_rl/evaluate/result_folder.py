"""The folder of an evaluation. An interrupted evaluation continues in its folder.

evaluation.json   description: weights, task, sampling, prompts; commands with equal descriptions continue each other
samples.jsonl     one JSON object per sample, written when it is verified; at the end in the order of the prompts
result.json       the metrics
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
from megatron_rl.rollout.records import sample_record
from megatron_rl.tasks.base import Verdict
from megatron_rl.util.atomic import replace_text

EVALUATION, SAMPLES, RESULT = "evaluation.json", "samples.jsonl", "result.json"

Json = Mapping[str, object]


@dataclass(frozen=True)
class EvaluatedSample:
    """The part of a sample that metrics use."""

    prompt_id: str
    index: int
    prompt: str
    answer: str
    task: str
    difficulty: str
    correct: bool
    verified: bool
    answer_read: str | None
    """The answer that was extracted from the response, for majority votes."""
    truncated: bool
    tokens: int


def describe_evaluation(run: Run, step: int, prompts: Sequence[Prompt]) -> Json:
    """Return the description of an evaluation, everything that determines its result, as JSON."""
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
    """Return size and modification time of the weight files, which is cheaper than a checksum."""
    patterns = ("*.safetensors", "*.distcp", ".metadata")
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in found}


class ResultFolder:
    """The folder of one evaluation, new or to be continued."""

    def __init__(self, folder: Path, description: Json, prompts: Sequence[Prompt]) -> None:
        """Create the folder, or read what a previous command wrote to it.

        Raises:
            ConfigError: the folder has the result of another evaluation, or cannot be written.
            DataError: two prompts have the same id.
        """
        self.folder, self.prompts = folder, {prompt.id: number for number, prompt in enumerate(prompts)}
        self.samples_per_prompt = int(str(description["samples"]))
        if len(self.prompts) < len(prompts):
            repeated = next(prompt.id for number, prompt in enumerate(prompts) if self.prompts[prompt.id] != number)
            raise DataError(f"two held-out prompts have the id {repeated!r}; ids must be unique")
        existing = read_description(folder) if (folder / EVALUATION).is_file() else None
        if existing is not None and existing != json.loads(json.dumps(description)):
            changes = "; ".join(differences(existing, description))
            raise ConfigError(f"{folder} has another evaluation ({changes}); give another --output, or delete it")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(folder / EVALUATION, json.dumps(description, indent=2) + "\n")
            self.finished = self._drop_incomplete()
        except OSError as error:
            raise ConfigError(f"cannot write results to {folder}: {error.strerror}; give another --output") from error

    def missing(self) -> set[int]:
        """Return the indices of the prompts without all samples."""
        return {index for prompt_id, index in self.prompts.items() if prompt_id not in self.finished}

    def add(self, group: Group, verdicts: Sequence[Verdict], task: str) -> None:
        """Append the samples of a prompt."""
        prompt = group.prompt
        labels = {"task": prompt.metadata.get("task", task), "difficulty": prompt.metadata.get("difficulty", "")}
        lines = [
            {"index": response.index, **labels, **sample_record(prompt, response, verdict), "read": verdict.answer}
            for response, verdict in zip(group.responses, verdicts, strict=True)
        ]
        with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(_null_if_not_finite(line), allow_nan=False) + "\n" for line in lines))
        self.finished.add(prompt.id)

    def finish(self) -> list[EvaluatedSample]:
        """Sort the samples by prompt; return them."""
        rows = sorted(
            _read_rows(self.folder / SAMPLES), key=lambda row: (self.prompts[str(row["prompt_id"])], row["index"])
        )
        self._write(rows)
        return read_samples(self.folder)

    def _drop_incomplete(self) -> set[str]:
        """Drop the samples of prompts that lack some; return the ids of the complete prompts."""
        rows = _read_rows(self.folder / SAMPLES)
        counts: dict[str, int] = {}
        for row in rows:
            counts[str(row["prompt_id"])] = counts.get(str(row["prompt_id"]), 0) + 1
        complete = {prompt_id for prompt_id, count in counts.items() if count == self.samples_per_prompt}
        self._write(row for row in rows if row["prompt_id"] in complete)
        return complete

    def _write(self, rows: Iterable[Json]) -> None:
        replace_text(self.folder / SAMPLES, "".join(json.dumps(row) + "\n" for row in rows))


def _null_if_not_finite(line: dict[str, object]) -> dict[str, object]:
    reward = line["reward"]
    return line if not isinstance(reward, float) or math.isfinite(reward) else {**line, "reward": None}


def _read_rows(file: Path) -> list[dict[str, object]]:
    """Return the lines of a file of samples, except for an incomplete last line."""
    if not file.is_file():
        return []
    lines = file.read_bytes().splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith(b"\n")]
    except ValueError as error:
        raise DataError(f"{file} has a line that is not JSON: {error}; delete the folder and evaluate again") from error


def read_description(folder: Path) -> Json:
    """Return the description of the evaluation in a folder.

    Raises:
        DataError: the folder has no evaluation.
    """
    file = folder / EVALUATION
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{folder} has no result: no {EVALUATION}; give a folder that eval has written") from error
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}; delete the folder and evaluate again") from error


def read_samples(folder: Path) -> list[EvaluatedSample]:
    """Return the samples of an evaluation."""
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
            answer_read=None if row["read"] is None else str(row["read"]),
            truncated=row["finish_reason"] == "length",
            tokens=int(str(row["tokens"])),
        )
        for row in _read_rows(folder / SAMPLES)
    ]


def differences(first: Json, second: Json, prefix: str = "") -> list[str]:
    """Return the differences of two descriptions as text, such as ``sampling.top_k: 0 -> 20``."""
    found: list[str] = []
    for name in dict.fromkeys([*first, *second]):
        before, after = first.get(name), second.get(name)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping) and name != "files":
            found += differences(before, after, f"{prefix}{name}.")
        elif name in ("files", "prompts_sha256"):
            found.append(f"{prefix}{name.partition('_')[0]} have changed")
        else:
            found.append(f"{prefix}{name}: {json.dumps(before)} -> {json.dumps(after)}")
    return found
