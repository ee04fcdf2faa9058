"""Lists of shipped configurations, written by their names."""

from __future__ import annotations

from collections.abc import Mapping

from sensikernels.ops.common.triton_launch import Config


def configs(sides: str, names: str) -> tuple[Config, ...]:
    """Configurations named as ``Config.name`` has it, such as ``128x64x32-w4-s4``.

    ``sides``: letters of the ``BLOCK_`` sizes, in the order of the names. Both are split at blanks.
    """
    return tuple(_config(sides.split(), name) for name in names.split())


def _config(sides: list[str], name: str) -> Config:
    sizes, warps, stages = name.split("-")
    blocks = (f"BLOCK_{side}" for side in sides)
    tile = dict(zip(blocks, map(int, sizes.split("x")), strict=True))
    return Config(tile=tile, warps=int(warps[1:]), stages=int(stages[1:]))


def stage_bytes(tile: Mapping[str, int], size: int) -> int:
    """Shared memory of one stage: a tile of each operand, ``size`` bytes an entry.

    The last side of the tile is the one that is summed over.
    """
    first, second, inner = tile.values()
    return (first + second) * inner * size
