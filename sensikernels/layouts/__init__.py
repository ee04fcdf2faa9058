"""Index tensors that say which entries of a weight are stored, and how: a mask made executable.

A layout is built once per mask change, and checks itself then; nothing here runs in a training
step. ``values`` are the kept entries in the layout's own shape (``values_shape``); ``pack`` and
``unpack`` are each other's inverse on them and both differentiable.
"""

from sensikernels.layouts.arguments import from_arguments, to_arguments
from sensikernels.layouts.entries import assign_, pack, unpack
from sensikernels.layouts.kinds import (
    BlockLayout,
    ElementLayout,
    Layout,
    PackedLayout,
    to_device,
)
from sensikernels.layouts.of_masks import layout_of

__all__ = [
    "BlockLayout",
    "ElementLayout",
    "Layout",
    "PackedLayout",
    "assign_",
    "from_arguments",
    "layout_of",
    "pack",
    "to_arguments",
    "to_device",
    "unpack",
]
