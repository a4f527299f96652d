"""Merges config files and ``key=value`` words, resolves paths, and validates the result against a schema.

This module knows no setting by name; ``config.schema`` has the schema.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megatron_rl.config.explain import explain
from megatron_rl.config.secret_settings import mask_urls, mask_variables, without_masked
from megatron_rl.config.section import ReadFrom
from megatron_rl.config.sources import ConfigSource, Key, is_file, raise_problems, read_sources
from megatron_rl.config.tree import annotations_of, field_at, lookup, section_of

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A valid configuration and its origins.

    Attributes:
        run: the typed configuration.
        origins: where each setting was written, by dotted key; settings at their default are absent.
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
    """Load a configuration from files and ``key=value`` words; later files override earlier ones, words override files.

    Raises:
        ConfigError: the configuration is invalid; the message lists all problems.
    """
    sources = read_sources(files, overrides)
    table: dict[str, object] = {}
    for source in sources:
        table = merge(
            model, table, without_masked(_without_retired(model, source.table)) if source.is_saved else source.table
        )
    table = _with_default_kinds(model, table)
    owners = {key: _owner(sources, key) for key in leaves(table)}
    origins = {key: source.origin(key) or "command line" for key, source in owners.items() if source is not None}
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
    settings = [word for word in words if "=" in word and not is_file(word)]
    return [word for word in words if word not in settings], settings


def merge(model: type[BaseModel] | None, base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """Return ``base`` updated with ``over``, table by table.

    If the discriminator of a table changes, such as ``objective.name``, the table of ``base`` is discarded.
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


def _without_retired(section: type[BaseModel] | None, table: Mapping[str, object]) -> dict[str, object]:
    """Return the table without the settings that no longer exist."""
    fields = section.model_fields if section else {}
    return {
        name: _without_retired(section_of(fields.get(name)), value) if isinstance(value, Mapping) else value
        for name, value in table.items()
        if name not in getattr(section, "retired", ())
    }


def _kind(field: FieldInfo | None) -> tuple[str, object] | None:
    """Return the discriminator of a union of sections and its default value, or None."""
    if field is None or not isinstance(field.discriminator, str):
        return None
    return field.discriminator, getattr(field.default, field.discriminator, None)


def _with_default_kinds(model: type[BaseModel], table: Mapping[str, object]) -> dict[str, object]:
    completed = dict(table)
    for name, field in model.model_fields.items():
        kind, value = _kind(field), completed.get(name)
        if kind and isinstance(value, Mapping):
            completed[name] = {kind[0]: kind[1], **value}
    return completed


def leaves(table: Mapping[str, object], prefix: Key = ()) -> Iterator[Key]:
    """Yield the keys of all values that are not tables, and of empty tables."""
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name)


def _owner(sources: Sequence[ConfigSource], key: Key) -> ConfigSource | None:
    """Return the last source that sets the key itself."""
    for source in reversed(sources):
        if lookup(source.table, key) is not None:
            return source
    return None


def _resolve_path(model: type[BaseModel], table: dict[str, object], key: Key, folder: Path) -> None:
    field = field_at(model, table, key) or field_at(
        model, table, key[:-1]
    )  # in a dictionary the field is that of the dictionary
    marks = [mark for mark in annotations_of(field) if isinstance(mark, ReadFrom)] if field else []
    holder = lookup(table, key[:-1])
    value = lookup(table, key)
    if marks and isinstance(value, str) and isinstance(holder, dict) and value and marks[0].when in value:
        holder[key[-1]] = str((folder / Path(value).expanduser()).absolute())


def to_json(run: BaseModel) -> str:
    """Return the configuration as JSON with all defaults; secrets are masked."""
    return mask_urls(json.dumps(mask_variables(run.model_dump(mode="json")), indent=2)) + "\n"


def settings(run: BaseModel, prefix: Key = ()) -> Iterator[tuple[str, object, str]]:
    """Yield (dotted key, value, description) of every setting, in schema order."""
    for name, field in type(run).model_fields.items():
        value = getattr(run, name)
        if isinstance(value, BaseModel):
            yield from settings(value, (*prefix, name))
        else:
            yield ".".join((*prefix, name)), _plain(value), field.description or ""


def _plain(value: object) -> object:
    """Return a dictionary of sections as a dictionary of their settings that are not at the default."""
    if not isinstance(value, Mapping):
        return value
    return {k: v.model_dump(exclude_defaults=True) if isinstance(v, BaseModel) else v for k, v in value.items()}
