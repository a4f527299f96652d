"""Functions and classes that a setting names by file: ``path/to/file.py:name``."""

import ast
import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, GetCoreSchemaHandler, ValidationInfo, create_model
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from megatron_rl.config.section import ReadFrom
from megatron_rl.errors import ConfigError

PATTERN = "path/to/file.py:Class"
"""How a class in a file is written; also the tag of such sections in pydantic's errors."""


class LoadError(Exception):
    """A file, or the name in it, cannot be used: the problem, and what to do about it."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(f"{problem}; {advice}")
        self.problem, self.advice = problem, advice


def load_object(name: str, setting: str, built_in: str = "") -> Any:
    """Return the function or class that ``path/to/file.py:name`` names.

    Args:
        name: the value of the setting.
        setting: its dotted key, for messages.
        built_in: the names that the setting takes otherwise, for messages.

    Raises:
        ConfigError: no such file, no such name in it, or the file cannot be imported.
    """
    try:
        return find_object(name, built_in)
    except LoadError as error:
        raise ConfigError(f"{error.problem} ({setting}); {error.advice}") from error.__cause__


def find_object(name: str, built_in: str = "") -> Any:
    """Return the function or class that ``path/to/file.py:name`` names.

    Raises:
        LoadError: no such file, no such name in it, or the file cannot be imported.
    """
    file, colon, attribute = name.rpartition(":")
    path = Path(file if colon else name)
    if path.suffix != ".py":
        raise LoadError(f"no such name: {name!r}", f"one of {built_in}, or path/to/file.py:name")
    if not path.is_file():
        raise LoadError(f"no such file: {path}", "write path/to/file.py:name")
    if not colon:
        raise LoadError(f"no name after the file {path}", f"write {name}:NAME, where NAME is {_defined_names(path)}")
    try:
        module = _module(path.resolve(), path.stat().st_mtime_ns)
    except Exception as error:
        raise LoadError(f"{path} cannot be imported: {type(error).__name__}: {error}", "correct the file") from error
    value = getattr(module, attribute, None)
    if not callable(value):
        members = [member for member in vars(module).values() if getattr(member, "__module__", "") == module.__name__]
        names = [member.__name__ for member in members if inspect.isfunction(member) or inspect.isclass(member)]
        raise LoadError(f"no function or class {attribute} in {path}", f"it has {', '.join(names) or 'none'}")
    return value


def _defined_names(path: Path) -> str:
    """Return the functions and classes of a file for a message; the file is parsed, not run."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError) as error:
        return f"a function or class of it; the file cannot be read: {error}"
    names = [part.name for part in body if isinstance(part, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    return f"one of {', '.join(names)}" if names else "a function or class; it defines none"


@cache
def _module(path: Path, _changed: int) -> ModuleType:
    """Return the imported file; the same module until the file changes."""
    name = f"megatron_rl_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, f"{path} ends in .py"
    assert spec.loader is not None, f"{path} ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic reads the docstrings of fields through it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@dataclass(frozen=True)
class OrClassInFile(ReadFrom):
    """Marks a union of sections, distinguished by a field, that also accepts a class in a file: ``name = "a.py:Mine"``.

    Attributes:
        base: the class that such a class must derive from.
        methods: names of the base's methods that such a class must define.
    """

    when: str = ".py"
    base: type[BaseModel] = BaseModel
    methods: tuple[str, ...] = ()

    def section(self, tag: str) -> type[BaseModel]:
        """Return the class that a tag names, as a section whose tag it is.

        Raises:
            LoadError: there is no such class, it does not derive from ``base``, or it lacks a method.
        """
        section = _tagged(find_object(tag), tag, self.base)
        missing = [name for name in self.methods if getattr(section, name) is getattr(self.base, name)]
        if missing:
            file, _, name = tag.rpartition(":")
            raise LoadError(f"{name} in {file} does not define {' and '.join(missing)}", "add the methods to the class")
        return section

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Add one choice to pydantic's tagged union: any tag with a file."""
        union = handler(source)
        assert union["type"] == "tagged-union", f"{source} needs Field(discriminator=...)"
        discriminator = str(union["discriminator"])

        def tag_of(value: object) -> object:
            tag = value.get(discriminator) if isinstance(value, Mapping) else getattr(value, discriminator, None)
            return PATTERN if isinstance(tag, str) and self.when in tag else tag

        def from_file(value: object, info: ValidationInfo) -> BaseModel:
            if isinstance(value, self.base):
                return value
            assert isinstance(value, Mapping), "it has a tag"
            try:
                section = self.section(value[discriminator])
            except LoadError as error:
                raise PydanticCustomError(
                    "from_file", "{problem}; {advice}", {"problem": error.problem, "advice": error.advice}
                ) from error
            if info.mode == "json":  # as strict as the rest of a configuration; arrays are tuples
                return section.model_validate_json(json.dumps(value), strict=True)
            return section.model_validate(value)

        choice = core_schema.with_info_plain_validator_function(from_file)
        return core_schema.tagged_union_schema({**union["choices"], PATTERN: choice}, tag_of)


@cache
def _tagged(found: object, tag: str, base: type[BaseModel]) -> type[BaseModel]:
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise LoadError(
            f"{tag.rpartition(':')[2]} in {tag.rpartition(':')[0]} is not a subclass of {base.__name__}",
            f"derive it from {base.__module__}.{base.__name__}",
        )
    literal: Any = Literal
    return create_model(found.__name__, __base__=found, __module__=found.__module__, name=(literal[tag], tag))
