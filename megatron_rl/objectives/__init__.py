"""The objectives: each file is a configuration section that is also the mathematics."""

from megatron_rl.objectives.base import Cost, Objective
from megatron_rl.objectives.cispo import CISPO
from megatron_rl.objectives.dppo import DPPO
from megatron_rl.objectives.espo import ESPO
from megatron_rl.objectives.gmpo import GMPO
from megatron_rl.objectives.grpo import GRPO
from megatron_rl.objectives.gspo import GSPO
from megatron_rl.objectives.sapo import SAPO
from megatron_rl.objectives.sspo import SSPO

AnyObjective = GRPO | GSPO | SAPO | SSPO | ESPO | CISPO | GMPO | DPPO
"""Told apart by ``name``."""

__all__ = ["CISPO", "DPPO", "ESPO", "GMPO", "GRPO", "GSPO", "SAPO", "SSPO", "AnyObjective", "Cost", "Objective"]
