"""Drop-in layers: ``MaskedLinear`` trims a weight, ``SelectiveLinear`` trains a part of it."""

from sensikernels.nn.dropout import CounterDropout
from sensikernels.nn.group import grouped_selective_linear
from sensikernels.nn.masked import MaskedLinear
from sensikernels.nn.selective import SelectiveLinear

__all__ = ["CounterDropout", "MaskedLinear", "SelectiveLinear", "grouped_selective_linear"]
