"""Masks, budgets, structures and plans: plain data, no ``nn.Module``."""

from sensikernels.masks.budget import Budget
from sensikernels.masks.flops import tokens_of, training_flops
from sensikernels.masks.latency import StepCosts
from sensikernels.masks.mask import Mask
from sensikernels.masks.planning import plan, uniform
from sensikernels.masks.plans import Measured, Plan
from sensikernels.masks.scores import Scores
from sensikernels.masks.structure import Coupling, Member, Structure

__all__ = [
    "Budget",
    "Coupling",
    "Mask",
    "Measured",
    "Member",
    "Plan",
    "Scores",
    "StepCosts",
    "Structure",
    "plan",
    "tokens_of",
    "training_flops",
    "uniform",
]
