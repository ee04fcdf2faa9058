"""Methods beside each other on one task: ``sensikernels compare``."""

from sensikernels.compare.compare import compare
from sensikernels.compare.contestant import Contestant, contestant
from sensikernels.compare.summary import lines

__all__ = ["Contestant", "compare", "contestant", "lines"]
