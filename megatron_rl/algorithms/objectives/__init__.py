"""The built-in objectives: each class is a configuration section and implements the loss that it configures.

Every import below registers one objective under its ``name``. A class outside the package is selected by file and class
name: ``objective.name = "path/to/mine.py:Mine"``.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from megatron_rl.algorithms.objectives.aspo import ASPO as ASPO
from megatron_rl.algorithms.objectives.bapo import BAPO as BAPO
from megatron_rl.algorithms.objectives.base import Cost as Cost
from megatron_rl.algorithms.objectives.base import Objective as Objective
from megatron_rl.algorithms.objectives.cispo import CISPO as CISPO
from megatron_rl.algorithms.objectives.dis import DIS as DIS
from megatron_rl.algorithms.objectives.dppo import DPPO as DPPO
from megatron_rl.algorithms.objectives.dro import DRO as DRO
from megatron_rl.algorithms.objectives.espo import ESPO as ESPO
from megatron_rl.algorithms.objectives.gmpo import GMPO as GMPO
from megatron_rl.algorithms.objectives.grpo import GRPO as GRPO
from megatron_rl.algorithms.objectives.gspo import GSPO as GSPO
from megatron_rl.algorithms.objectives.lco import LCO as LCO
from megatron_rl.algorithms.objectives.minpro import MinPRO as MinPRO
from megatron_rl.algorithms.objectives.r2vpo import R2VPO as R2VPO
from megatron_rl.algorithms.objectives.reinforce import Reinforce as Reinforce
from megatron_rl.algorithms.objectives.sapo import SAPO as SAPO
from megatron_rl.algorithms.objectives.soft_sequence import SoftSequence as SoftSequence
from megatron_rl.algorithms.objectives.sspo import SSPO as SSPO
from megatron_rl.algorithms.objectives.vespo import VESPO as VESPO
from megatron_rl.config.from_file import OrClassInFile

OBJECTIVES: Mapping[str, type[Objective]] = {
    str(section.model_fields["name"].default): section
    for section in list(globals().values())
    if isinstance(section, type) and issubclass(section, Objective) and section is not Objective
}
"""The registered objectives by name."""

if TYPE_CHECKING:
    AnyObjective = Objective
else:
    AnyObjective = Annotated[
        Union[*OBJECTIVES.values()],
        Field(discriminator="name"),
        OrClassInFile(base=Objective, methods=("columns", "cost")),
    ]
"""A registered objective, selected by ``name``, or a class in a file."""
