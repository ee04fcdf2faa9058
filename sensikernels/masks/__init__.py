"""Masks, budgets, structures and plans: plain data, no ``nn.Module``."""

from sensikernels.masks.budget import Budget
from sensikernels.masks.geometry import Geometry, tokens_of
from sensikernels.masks.mask import Mask
from sensikernels.masks.planning import plan, uniform
from sensikernels.masks.plans import Plan
from sensikernels.masks.scores import Scores
from sensikernels.masks.step_costs import StepCosts
from sensikernels.masks.structure import Coupling, Member, Structure

__all__ = [
    "Budget",
    "Coupling",
    "Geometry",
    "Mask",
    "Member",
    "Plan",
    "Scores",
    "StepCosts",
    "Structure",
    "plan",
    "tokens_of",
    "uniform",
]
