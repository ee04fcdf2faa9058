"""Index tensors that say which entries of a weight are stored, and how: a mask made executable.

A layout is built once per mask change, and checks itself then; nothing here runs in a training
step. ``values`` are the kept entries in the layout's own shape (``values_shape``); ``kept_values``
and ``full_weight`` are each other's inverse on them and both differentiable.
"""

from sensikernels.layouts.arguments import from_arguments, to_arguments
from sensikernels.layouts.entries import assign_, full_weight, kept_values
from sensikernels.layouts.kinds import (
    BlockLayout,
    CompactLayout,
    ElementLayout,
    Layout,
    to_device,
)
from sensikernels.layouts.of_masks import layout_of

__all__ = [
    "BlockLayout",
    "CompactLayout",
    "ElementLayout",
    "Layout",
    "assign_",
    "from_arguments",
    "full_weight",
    "kept_values",
    "layout_of",
    "to_arguments",
    "to_device",
]
