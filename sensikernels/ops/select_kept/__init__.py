"""From scores and a budget to the kept units."""

from sensikernels.ops.select_kept.api import explain_units, select_kept
from sensikernels.ops.select_kept.chain import select_chain
from sensikernels.ops.select_kept.elements import KeptElements, explain, select_elements

__all__ = [
    "KeptElements",
    "explain",
    "explain_units",
    "select_chain",
    "select_elements",
    "select_kept",
]
