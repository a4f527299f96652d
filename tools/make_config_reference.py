"""Write docs/config.md and docs/run-folder.md from the code: python tools/make_config_reference.py [--check]

With --check nothing is written; the exit code is 1 if a page is not what the code says.
"""

import argparse
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_rl.config.schema import Run
from megatron_rl.config.tree import members
from megatron_rl.observability.metric_keys import METRIC_KEYS

DOCS = Path(__file__).resolve().parents[1] / "docs"
MADE = "<!-- Made by tools/make_config_reference.py: change the code, then run it. -->"
WORDS = {int: "integer", float: "number", str: "text", bool: "boolean"}

CONFIG_HEAD = """# Configuration

This page lists every setting. `megatron-rl train a.toml b.toml key=value`: later files override earlier ones, tables
are merged, and `section.key=value` overrides files. A key that is not on this page is an error. A relative path in a
file starts at that file's folder; in `key=value`, and in `log.path`, at the current folder. `megatron-rl check` prints
every value and where it was set.
"""

FOLDER_HEAD = """# The run folder

This page lists the files of a run and the keys of `metrics.jsonl`. The folder is `log.path`; `tools/demo` uses the
first unused one of `runs/demo`, `runs/demo-2`, ...

| file | content |
|---|---|
| `config.json` | all settings with defaults |
| `lock` | the process that writes to the folder, while it runs |
| `job.sbatch`, `secrets.toml` | the job script of `megatron-rl slurm`, and its settings that may be secret |
| `versions.json` | versions of Python, torch, megatron-core and other packages that can change a number |
| `metrics.jsonl` | one JSON object per step, keys below |
| `rollouts.jsonl` | one per sample: text, turns, roles, mask, reward, reason, weight versions; `log.rollouts` |
| `tokens.jsonl` | one per step: responses by token, counts of clipped segments; `log.tokens`, [report.md](report.md) |
| `ledger.jsonl` | one per group sampled for training: its outcome and lag ([async.md](async.md#ledger-and-resuming)) |
| `console.log` | the console table with the time of day |
| `history.jsonl` | settings and versions that a resumed run changed, with the step, old and new values |
| `warnings.jsonl` | why the run may learn nothing ([troubleshooting.md](troubleshooting.md#no-learning)) |
| `mismatch.json` | the tokens of the newest step on which engine and trainer differ most |
| `nonfinite/` | after NaN or inf: the micro-batch and its weights, for `megatron-rl debug-nonfinite` |
| `hang/` | after a hang: `report.txt` with the missing ranks and every rank's stack |
| `servers/server_0.log` | log of a rollout server that the run started |
| `checkpoints/step_00000060/` | weights, moments, generators, sampler ([checkpoints.md](checkpoints.md)) |
| `export/` | the trained model as a Hugging Face checkpoint; `checkpoint.export` |
| `exports/step_00000060/` | the same during training; `checkpoint.export_every` |

`python tools/compare_runs.py RUN_A RUN_B` compares two runs bit for bit, except for times.

## Keys of metrics.jsonl

| key | meaning |
|---|---|
"""


def config_page() -> str:
    """Return docs/config.md: one section per class, and meanings that repeat as references to their first variant."""
    parts = [MADE, CONFIG_HEAD]
    for name, field in Run.model_fields.items():
        tags: dict[type[BaseModel], list[str]] = {}
        for tag, section in members(field).items():
            tags.setdefault(section, []).append(tag)
        seen: dict[str, str] = {}
        for section, names in tags.items():
            quoted = " or ".join(f'"{tag}"' for tag in names)
            title = f"[{name}] with {field.discriminator} = {quoted}" if names != [""] else f"[{name}]"
            parts.append(f"## {title}\n\n{_paragraph(section)}\n")
            rows = _rows(section, seen=seen, variant=names[0])
            parts.append("\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _rows(section: type[BaseModel], seen: dict[str, str], variant: str, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = members(field).get("")
        if inner is not None:
            yield from _rows(inner, seen, variant, f"{prefix}{name}.")
        elif field.description and (entry := _entry(field)) is not None:
            yield f"| `{prefix}{name}` | table of tables | {_default(field)} | {_cell(field.description)} |"
            yield from _rows(entry, seen, variant, f"{prefix}{name}.NAME.")
        elif field.description:  # the heading has the name of a variant
            first = seen.setdefault(f"{name} {field.description}", variant)
            meaning = f"See `{first}`." if first != variant else _cell(field.description)
            yield f"| `{prefix}{name}` | {_kind(field)} | {_default(field)} | {meaning} |"


def _entry(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section of the entries of a dictionary of sections, else None."""
    arguments = get_args(field.annotation)
    entry = arguments[1] if get_origin(field.annotation) is dict else None
    return entry if isinstance(entry, type) and issubclass(entry, BaseModel) else None


def _cell(text: str) -> str:
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


def _paragraph(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").partition("\n\n")[0].replace("``", "`")


def _kind(field: FieldInfo) -> str:
    words = _type(field.annotation)
    bounds = [
        f"{sign}{value:g}"
        for mark in field.metadata
        for sign, value in ((s, getattr(mark, a)) for s, a in BOUNDS if hasattr(mark, a))
    ]
    return ", ".join([words, *bounds])


BOUNDS = ((">=", "ge"), (">", "gt"), ("<=", "le"), ("<", "lt"))


def _type(annotation: object) -> str:
    if isinstance(annotation, type) and annotation in WORDS:
        return WORDS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in arguments if part is not types.NoneType)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "table"
    return _type(arguments[0]) if arguments else str(annotation)  # Annotated


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be set"
    value = field.get_default(call_default_factory=True, validated_data={})
    assert value is not PydanticUndefined, field
    if value is None:
        return "none"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


def folder_page() -> str:
    """Return docs/run-folder.md."""
    rows = [f"| `{key}` | {_cell(meaning)} |" for key, meaning in METRIC_KEYS.items()]
    return "\n".join([MADE, FOLDER_HEAD.rstrip("\n"), *rows]) + "\n\nNumbers that are not finite are written as null.\n"


def main() -> int:
    """Write the pages, or check them; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name, text in (("config.md", config_page()), ("run-folder.md", folder_page())):
        file = DOCS / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                file.write_text(text, encoding="utf-8")
    print(f"{'out of date' if check else 'written'}: {', '.join(stale)}" if stale else "up to date")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
