"""The base of every configuration section."""

from collections.abc import Mapping
from dataclasses import dataclass
from os.path import expanduser
from typing import Annotated, ClassVar

from annotated_types import Le, Lt
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

MAX_INTEGER = (1 << 40) - 1
"""Bound of integers without a bound of their own: above every count of tokens, steps or bytes of a run."""


class Section(BaseModel):
    """A frozen group of typed settings; unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="after")
    @classmethod
    def _check_size(cls, value: object, info: ValidationInfo) -> object:
        """Refuse integers that no library takes, unless the field has bounds of its own on both sides."""
        field = cls.model_fields[info.field_name or ""]
        upper = any(isinstance(mark, Le | Lt) for mark in field.metadata)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not isinstance(number, bool) and not upper and abs(number) > MAX_INTEGER:
                raise ValueError(f"{info.field_name} is {number}; write at most {MAX_INTEGER}")
        return value

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

OutputPath = Annotated[str, AfterValidator(expanduser)]
"""A file or folder to write. ``~`` is the home folder; a relative path is relative to the working directory."""

PathToFunction = Annotated[str, ReadFrom(when=".py")]
"""A name, or ``path/to/file.py:function`` with a path like ``InputPath``."""
