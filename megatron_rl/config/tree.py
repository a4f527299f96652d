"""Questions about a tree of sections: what is at a key, which kinds can a table be."""

import types
from collections.abc import Iterator, Mapping
from typing import Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_rl.config.sources import Key


def members(field: FieldInfo | None) -> dict[str, type[BaseModel]]:
    """Return the sections that a field can hold, by the value of its discriminator; ``""`` if there is only one."""
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
    """Return the section that a field holds if there is only one kind."""
    return members(field).get("")


def section_at(field: FieldInfo | None, table: object) -> type[BaseModel] | None:
    """Return the section that a field holds, chosen by the table's discriminator."""
    kinds = members(field)
    if field is None or not isinstance(field.discriminator, str):
        return kinds.get("")
    tag = table.get(field.discriminator) if isinstance(table, Mapping) else None
    return kinds.get(tag) if isinstance(tag, str) else None


def field_at(model: type[BaseModel], table: Mapping[str, object], key: Key) -> FieldInfo | None:
    """Return the field at a key, None if there is none."""
    section: type[BaseModel] | None = model
    field: FieldInfo | None = None
    here: object = table
    for part in key:
        field = section.model_fields.get(part) if section else None
        here = here.get(part) if isinstance(here, Mapping) else None
        section = section_at(field, here)
    return field


def marks_of(field: FieldInfo) -> list[object]:
    """Return what a field is annotated with, also where only one side of ``InputPath | None`` is."""
    parts = [getattr(part, "__metadata__", ()) for part in get_args(field.annotation)]
    return [*field.metadata, *(mark for part in parts for mark in part)]


def all_fields(model: type[BaseModel], prefix: Key = (), kind: str = "") -> Iterator[tuple[Key, FieldInfo, str]]:
    """Yield key, field and kind of every setting; kind is such as ``objective.name = "espo"``, or empty."""
    for name, field in model.model_fields.items():
        kinds = members(field)
        for tag, section in kinds.items():
            label = f'{".".join((*prefix, name))}.{field.discriminator} = "{tag}"' if tag else kind
            yield from all_fields(section, (*prefix, name), label)
        if not kinds:
            yield (*prefix, name), field, kind


def lookup(table: object, key: Key) -> object:
    """Return what nested tables hold at a key, None if nothing."""
    for part in key:
        table = table.get(part) if isinstance(table, Mapping) else None
    return table
