"""Packed tokens: a model runs on the tokens of a batch end to end, without padding."""

from sensikernels.hf.packed.step import (
    cache_frozen_prefix,
    computed,
    packing_of,
    restore_packed,
    unpacked,
    use_packed,
)

__all__ = [
    "cache_frozen_prefix",
    "computed",
    "packing_of",
    "restore_packed",
    "unpacked",
    "use_packed",
]
