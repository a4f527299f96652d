"""One gauge value: a number with a name, a description and labels."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Snapshot:
    """The value of a gauge at one moment.

    Attributes:
        name: of the gauge, without the common prefix.
        words: description of the gauge.
        value: the number.
        labels: distinguish several gauges of the same name, such as one per server.
    """

    name: str
    words: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)
