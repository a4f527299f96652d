"""Lookups in a tree of configuration sections, some of which are unions selected by a discriminator."""

import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_rl.config.from_file import LoadError, OrClassInFile
from megatron_rl.config.sources import Key


def members(field: FieldInfo | None) -> dict[str, type[BaseModel]]:
    """Return the sections that a field can hold, by discriminator value; by ``""`` if there is only one."""
    if field is None:
        return {}
    is_union = get_origin(field.annotation) in (Union, types.UnionType)
    parts = get_args(field.annotation) if is_union else (field.annotation,)
    sections = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
    if not isinstance(field.discriminator, str):
        return {"": sections[0]} if sections else {}
    return {tag: section for section in sections for tag in _tags(section, field.discriminator)}


def _tags(section: type[BaseModel], discriminator: str) -> tuple[str, ...]:
    annotation = section.model_fields[discriminator].annotation
    assert get_origin(annotation) is Literal, f"{section.__name__}.{discriminator} must be a Literal, is {annotation}"
    return get_args(annotation)


def section_of(field: FieldInfo | None) -> type[BaseModel] | None:
    """Return the section of a field that is not a union, else None."""
    return members(field).get("")


def section_at(field: FieldInfo | None, table: object) -> type[BaseModel] | None:
    """Return the section of a field, selected by the discriminator in the table; None if that is unknown."""
    kinds = members(field)
    if field is None or not isinstance(field.discriminator, str):
        return kinds.get("")
    tag = table.get(field.discriminator) if isinstance(table, Mapping) else None
    for mark in field.metadata:
        # A relative path is not resolved yet: it would name another file.
        if isinstance(mark, OrClassInFile) and isinstance(tag, str) and mark.when in tag and Path(tag).is_absolute():
            try:
                return mark.section(tag)
            except LoadError:
                return None
    return kinds.get(tag) if isinstance(tag, str) else None


def field_at(model: type[BaseModel], table: Mapping[str, object], key: Key) -> FieldInfo | None:
    """Return the field at a key, or None."""
    section: type[BaseModel] | None = model
    field: FieldInfo | None = None
    value: object = table
    for part in key:
        field = section.model_fields.get(part) if section else None
        value = value.get(part) if isinstance(value, Mapping) else None
        section = section_at(field, value)
    return field


def annotations_of(field: FieldInfo) -> list[object]:
    """Return the annotations of a field, including those inside a union such as ``InputPath | None``."""
    parts = [getattr(part, "__metadata__", ()) for part in get_args(field.annotation)]
    return [*field.metadata, *(mark for part in parts for mark in part)]


def all_fields(model: type[BaseModel], prefix: Key = (), condition: str = "") -> Iterator[tuple[Key, FieldInfo, str]]:
    """Yield (key, field, condition) of every setting; a condition is ``objective.name = "espo"`` or empty."""
    for name, field in model.model_fields.items():
        kinds = members(field)
        for tag, section in kinds.items():
            label = f'{".".join((*prefix, name))}.{field.discriminator} = "{tag}"' if tag else condition
            yield from all_fields(section, (*prefix, name), label)
        if not kinds:
            yield (*prefix, name), field, condition


def lookup(table: object, key: Key) -> object:
    """Return the value of nested tables at a key, or None."""
    for part in key:
        table = table.get(part) if isinstance(table, Mapping) else None
    return table
