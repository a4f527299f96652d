"""Turns pydantic's errors into sentences: what is wrong, the value, where it was set, what to write instead."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_rl.config.from_file import PATTERN
from megatron_rl.config.sources import Key
from megatron_rl.config.tree import all_fields, field_at, lookup, members, section_at

Origins = Mapping[Key, str]


def explain(model: type[BaseModel], table: Mapping[str, object], origins: Origins, error: ValidationError) -> list[str]:
    """Return one sentence per wrong key, in schema order."""
    found: dict[Key, str] = {}
    for detail in error.errors(include_url=False):
        key = _key(model, table, detail["loc"])
        sentence = _sentence(model, table, origins, key, detail)
        found[key] = f"{found[key]}, or {_remedy(detail)}" if key in found else sentence
    return list(found.values())


def _key(model: type[BaseModel], table: Mapping[str, object], loc: Sequence[int | str]) -> Key:
    """Return the key of an error's location, without the tags and type names that pydantic adds."""
    section: type[BaseModel] | None = model
    value: object = table
    key: Key = ()
    tags: set[str] = set()
    for part in loc:
        if part in tags:
            tags = set()
            continue
        if not isinstance(part, str) or (section is None and not (isinstance(value, Mapping) and part in value)):
            break
        key = (*key, part)
        field = section.model_fields.get(part) if section else None
        value = value.get(part) if isinstance(value, Mapping) else None
        section = section_at(field, value)
        tags = {*members(field), PATTERN} if field is not None and field.discriminator else set()
    return key


def _sentence(
    model: type[BaseModel], table: Mapping[str, object], origins: Origins, key: Key, detail: ErrorDetails
) -> str:
    dotted, kind = ".".join(key), detail["type"]
    if kind == "extra_forbidden":
        return (
            f"unknown key {dotted}: {_show(detail['input'])} ({_origin(origins, key)}); {_suggest(model, table, key)}"
        )
    if kind == "missing":
        return _missing(model, table, key)
    if kind == "union_tag_invalid":
        tag_key = (*key, _discriminator(model, table, key))
        tags = [tag.strip("' ") for tag in detail["ctx"]["expected_tags"].split(",")]
        tag = str(detail["ctx"]["tag"])
        return f'no such {".".join(tag_key)}: "{tag}" ({_origin(origins, tag_key)}); {_choose(tag, tags)}'
    if kind == "union_tag_not_found":
        tag_key, choices = (*key, _discriminator(model, table, key)), members(field_at(model, table, key))
        return f"{'.'.join(tag_key)} is not set ({_origin(origins, key)}); write {_choose('', list(choices))}"
    if kind == "from_file":
        origin = _origin(origins, (*key, _discriminator(model, table, key)))
        return f"{detail['ctx']['problem']} ({origin}); {detail['ctx']['advice']}"
    if kind in ("value_error", "assertion_error"):
        return f"{dotted or 'configuration'}: {_remedy(detail)} ({_origins_named(origins, key, detail['msg'])})"
    return f"wrong value for {dotted}: {_show(detail['input'])} ({_origin(origins, key)}); {_remedy(detail)}"


def _discriminator(model: type[BaseModel], table: Mapping[str, object], key: Key) -> str:
    field = field_at(model, table, key)
    assert field is not None, f"{key} is a table of several kinds"
    return str(field.discriminator)


def _show(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 100 else text[:97] + "..."


def _origin(origins: Origins, key: Key) -> str:
    """Return where a key was set; for a table, where its settings were set."""
    if key in origins:
        return origins[key]
    below = [origin for other, origin in origins.items() if other[: len(key)] == key]
    return ", ".join(dict.fromkeys(below)) or "default"


def _origins_named(origins: Origins, key: Key, message: str) -> str:
    """Return where the settings named in a message about a table were set, or all of the table if it names none."""
    named = {
        other: origin
        for other, origin in origins.items()
        if other[: len(key)] == key
        and re.search(rf"(?<![\w.]){re.escape('.'.join(other[len(key) :]))}(?![\w.])", message)
    }
    return _origin(named or origins, key)


def _missing(model: type[BaseModel], table: Mapping[str, object], key: Key) -> str:
    required = [
        other
        for other, field, _ in all_fields(model)
        if other[: len(key)] == key and field.is_required() and field_at(model, table, other) is not None
    ] or [key]
    lines = []
    for other in required:
        field = field_at(model, table, other)
        *tables, name = other
        meaning = f": {field.description.rstrip('.')}" if field is not None and field.description else ""
        lines.append(f"{'.'.join(other)} is not set; write {name} = ... under [{'.'.join(tables)}]{meaning}")
    return "; ".join(lines)


def _remedy(detail: ErrorDetails) -> str:
    kind, value = detail["type"], detail["input"]
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message.replace("Input should", "it should")
    if kind == "literal_error" and isinstance(value, str):
        choices = [choice.strip("' ") for choice in detail["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return _choose(value, choices)
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if (
        kind in ("int_type", "float_type")
        and isinstance(value, str)
        and value.strip("+-").replace(".", "", 1).isdigit()
    ):
        return f"write {value} without quotes"
    if kind in ("tuple_type", "list_type"):
        return f"write [{_show(value)}]"
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return "it should be a table"
    if kind == "bool_type":
        return "write true or false"
    if kind == "string_type" and isinstance(value, int | float):
        return f'write "{_show(value)}" in quotes'
    if kind == "string_type" and isinstance(value, str):
        return "write it in quotes"
    return message


def _choose(value: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(value, choices, 1)
    listed = ", ".join(f'"{choice}"' for choice in choices)
    return f'did you mean "{close[0]}"? (one of {listed})' if close else f"one of {listed}"


def _suggest(model: type[BaseModel], table: Mapping[str, object], key: Key) -> str:
    """Return a suggestion for an unknown key."""
    *above, name = key
    prefix = tuple(above)
    field = field_at(model, table, prefix) if prefix else None
    section = section_at(field, lookup(table, prefix)) if prefix else model
    names = list(section.model_fields) if section else []
    if name in (retired := getattr(section, "retired", {})):
        return f"it was replaced by {'.'.join((*prefix, retired[name]))}"
    if close := difflib.get_close_matches(name, names, 1, 0.75):
        return f"did you mean {'.'.join((*prefix, close[0]))}?"
    everywhere = [(other, condition) for other, _, condition in all_fields(model)]
    if conditions := [condition for other, condition in everywhere if other == key and condition]:
        return f"it belongs to {' or '.join(conditions)}"
    for other, condition in everywhere:
        if other[-1] == name:
            return f"did you mean {'.'.join(other)}{f', with {condition}' if condition else ''}?"
    words = set(name.split("_"))
    if contained := [known for known in names if set(known.split("_")) <= words]:
        return f"did you mean {'.'.join((*prefix, max(contained, key=len)))}?"
    if close := difflib.get_close_matches(name, names, 1):
        return f"did you mean {'.'.join((*prefix, close[0]))}?"
    keys = {other[-1]: other for other, _ in everywhere}
    if close := difflib.get_close_matches(name, keys, 1, 0.75):
        return f"did you mean {'.'.join(keys[close[0]])}?"
    return f"known keys: {', '.join(names)}"
