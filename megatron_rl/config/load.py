"""From sources to a typed tree: merge, resolve, validate, and explain every problem at once.

This file knows no setting by name; ``config.schema`` is the tree.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megatron_rl.config.explain import explain
from megatron_rl.config.section import ReadFrom
from megatron_rl.config.sources import Key, Source, raise_problems, read_sources
from megatron_rl.config.tree import field_at, lookup, marks_of, section_of

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A valid configuration and where it came from.

    Attributes:
        run: the typed tree.
        origins: where each setting that is not left at its default was written, by dotted key.
    """

    run: T
    origins: Mapping[str, str]

    def origin(self, dotted: str) -> str:
        """Return where a setting was written, or ``default``."""
        return self.origins.get(dotted, "default")

    def describe(self, dotted: str) -> str:
        """Return the key, value and origin of a setting, for an error message."""
        value: object = self.run
        for name in dotted.split("."):
            value = value[name] if isinstance(value, Mapping) else getattr(value, name)
        return f"{dotted} = {value!r} ({self.origin(dotted)})"


def load(model: type[T], files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Loaded[T]:
    """Return the configuration that files and ``key=value`` words give, later ones stronger; raise ConfigError."""
    sources = read_sources(files, overrides)
    table: dict[str, object] = {}
    for source in sources:
        table = merge(model, table, source.table)
    table = _with_default_kinds(model, table)
    owners = {key: _owner(sources, key) for key in leaves(table)}
    origins = {key: source.place(key) or "command line" for key, source in owners.items() if source is not None}
    for key, source in owners.items():
        if source is not None:
            _resolve_path(model, table, key, source.folder)
    try:
        run = model.model_validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        raise_problems(explain(model, table, origins, error))
        raise
    return Loaded(run, {".".join(key): place for key, place in origins.items()})


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split command-line words into config files and ``key=value`` settings; an existing file is never a setting."""
    settings = [word for word in words if "=" in word and not Path(word).is_file()]
    return [word for word in words if word not in settings], settings


def merge(model: type[BaseModel] | None, base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """Return ``base`` with ``over`` laid on top, table by table.

    A table whose kind changes, such as ``objective.name``, starts anew: options of one kind mean nothing to another.
    """
    merged = dict(base)
    for name, value in over.items():
        below, field = merged.get(name), model.model_fields.get(name) if model else None
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            kind = _kind(field)
            if kind and value.get(kind[0], below.get(kind[0], kind[1])) != below.get(kind[0], kind[1]):
                merged[name] = dict(value)
            else:
                merged[name] = merge(section_of(field), below, value)
        else:
            merged[name] = value
    return merged


def _kind(field: FieldInfo | None) -> tuple[str, object] | None:
    """Return the discriminating key of a table and its default, if the table is of several kinds."""
    if field is None or not isinstance(field.discriminator, str):
        return None
    return field.discriminator, getattr(field.default, field.discriminator)


def _with_default_kinds(model: type[BaseModel], table: Mapping[str, object]) -> dict[str, object]:
    completed = dict(table)
    for name, field in model.model_fields.items():
        kind, value = _kind(field), completed.get(name)
        if kind and isinstance(value, Mapping):
            completed[name] = {kind[0]: kind[1], **value}
    return completed


def leaves(table: Mapping[str, object], prefix: Key = ()) -> Iterator[Key]:
    """Yield the key of every value that is not a table, and of every empty table."""
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name)


def _owner(sources: Sequence[Source], key: Key) -> Source | None:
    """Return the strongest source that sets this very key."""
    for source in reversed(sources):
        if lookup(source.table, key) is not None:
            return source
    return None


def _resolve_path(model: type[BaseModel], table: dict[str, object], key: Key, folder: Path) -> None:
    field = field_at(model, table, key) or field_at(model, table, key[:-1])  # of a table: what its values are
    marks = [mark for mark in marks_of(field) if isinstance(mark, ReadFrom)] if field else []
    holder = lookup(table, key[:-1])
    value = lookup(table, key)
    if marks and isinstance(value, str) and isinstance(holder, dict) and value and marks[0].when in value:
        holder[key[-1]] = str((folder / Path(value).expanduser()).absolute())


def to_json(run: BaseModel) -> str:
    """Return the whole tree as JSON, defaults and nulls included; user names and passwords in URLs are masked."""
    return re.sub(r'://[^/@"\s]*@', "://***@", run.model_dump_json(indent=2)) + "\n"


def settings(run: BaseModel, prefix: Key = ()) -> Iterator[tuple[str, object, str]]:
    """Yield dotted key, value and documentation of every setting, in the order of the tree."""
    for name, field in type(run).model_fields.items():
        value = getattr(run, name)
        if isinstance(value, BaseModel):
            yield from settings(value, (*prefix, name))
        else:
            yield ".".join((*prefix, name)), _plain(value), field.description or ""


def _plain(value: object) -> object:
    """Return a table of sections as a table of what is set in them."""
    if not isinstance(value, Mapping):
        return value
    return {k: v.model_dump(exclude_defaults=True) if isinstance(v, BaseModel) else v for k, v in value.items()}
