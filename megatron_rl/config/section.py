"""The base of every configuration section."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of typed settings; unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    retired: ClassVar[Mapping[str, str]] = {}
    """Former settings and the setting that replaces each: named in errors, and dropped from older run folders."""


@dataclass(frozen=True)
class ReadFrom:
    """Marks a field with a path, which ``config.load`` resolves relative to the file that sets it.

    Attributes:
        when: only values that contain this text are paths; empty: all values.
    """

    when: str = ""


InputPath = Annotated[str, ReadFrom()]
"""A file or folder to read. A relative path is relative to the folder of the TOML file that sets it; in ``key=value``,
and in ``log.path``, to the working directory."""

PathToFunction = Annotated[str, ReadFrom(when=".py")]
"""A name, or ``path/to/file.py:function`` with a path like ``InputPath``."""
