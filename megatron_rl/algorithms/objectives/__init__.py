"""The objectives: each file is a configuration section that is also the mathematics."""

from megatron_rl.algorithms.objectives.base import Cost, Objective
from megatron_rl.algorithms.objectives.cispo import CISPO
from megatron_rl.algorithms.objectives.dppo import DPPO
from megatron_rl.algorithms.objectives.espo import ESPO
from megatron_rl.algorithms.objectives.gmpo import GMPO
from megatron_rl.algorithms.objectives.grpo import GRPO
from megatron_rl.algorithms.objectives.gspo import GSPO
from megatron_rl.algorithms.objectives.sapo import SAPO
from megatron_rl.algorithms.objectives.sspo import SSPO

AnyObjective = GRPO | GSPO | SAPO | SSPO | ESPO | CISPO | GMPO | DPPO
"""Told apart by ``name``."""

__all__ = ["CISPO", "DPPO", "ESPO", "GMPO", "GRPO", "GSPO", "SAPO", "SSPO", "AnyObjective", "Cost", "Objective"]
