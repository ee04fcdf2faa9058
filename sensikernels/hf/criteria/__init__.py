"""Statistics that rank units: taps on activations, sums over weights and gradients."""

from sensikernels.hf.criteria.steps import StepScores
from sensikernels.hf.criteria.taps import STATISTICS, UnitTap, tap
from sensikernels.hf.criteria.weights import unit_sums, unit_table

__all__ = ["STATISTICS", "StepScores", "UnitTap", "tap", "unit_sums", "unit_table"]
