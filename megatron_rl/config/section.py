"""The base of every configuration section."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of typed, documented settings that refuses unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


@dataclass(frozen=True)
class ReadFrom:
    """Marks a field that names something to read, which ``config.load`` resolves against the file that sets it.

    Attributes:
        when: only values that contain this text are paths.
    """

    when: str = ""


InputPath = Annotated[str, ReadFrom()]
"""A file or folder to read. A relative path begins at the folder of the TOML file that sets it; in ``key=value`` and in
``log.path``, which is written to, at the folder where the command runs."""

PathToFunction = Annotated[str, ReadFrom(when=".py:")]
"""A name, or ``path/to/file.py:function`` with a path as in ``InputPath``."""
