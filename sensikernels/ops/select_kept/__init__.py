"""From scores and a budget to the kept units."""

from sensikernels.ops.select_kept.api import select_kept
from sensikernels.ops.select_kept.elements import KeptElements, explain, select_elements

__all__ = ["KeptElements", "explain", "select_elements", "select_kept"]
