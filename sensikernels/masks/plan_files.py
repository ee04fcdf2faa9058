"""Plans on disk: what a plan file must say, checked before anything is made of it.

``plan.json`` holds everything but the grids, the digest of ``plan.safetensors`` beside it, which
holds them as uint8, and a digest of itself. So a file that was edited or damaged, or one that is
not the other's, is refused; what remains is checked as a stranger's would be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sensikernels._core.checks import require, require_one_of
from sensikernels.masks.mask import Mask
from sensikernels.masks.structure import Coupling, coupling_from_json

FORMAT = 2
WEIGHT_MASK, UPDATE_MASK = "weight_mask", "update_mask"
REMEDY = (
    "make it anew with `sensikernels plan`, which takes counts too (--units heads=36,neurons=4608)"
)
KINDS = ("heads", "neurons", "qk", "vo")
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_LARGEST = 1 << 24  # of a weight's side


def read_masks(items: Any, grids: Mapping[str, Tensor]) -> dict[str, dict[str, Mask]]:
    """Masks by kind and module. Raises ValueError where grids and list are not one another's."""
    masks: dict[str, dict[str, Mask]] = {WEIGHT_MASK: {}, UPDATE_MASK: {}}
    for item in items:
        kind, module = item["kind"], _name(item["module"], "module")
        require_one_of(kind, "mask kind", masks)
        require(module not in masks[kind], f"{kind} of {module}", "one", "several")
        block, shape = (_sizes(item[name], f"{module} {name}") for name in ("block_shape", "shape"))
        grid = grids[f"{kind}:{module}"]
        _require_bits(grid, module)
        masks[kind][module] = Mask(grid=grid.bool(), block_shape=block, shape=shape)
    count = sum(map(len, masks.values()))
    require(len(grids) == count, "grids", f"{count}, one for each mask", len(grids))
    return masks


def read_coupling(data: Any) -> Coupling:
    """A coupling of plain, possible values. Raises ValueError."""
    made = coupling_from_json(data)
    where = f"coupling {_name(made.name, 'coupling')}"
    require_one_of(made.kind, f"{where} kind", KINDS)
    for field, least in (("layer", 0), ("units", 1), ("unit_size", 1), ("params", 0), ("heads", 1)):
        whole_number(getattr(made, field), f"{where} {field}", least)
    for field in ("linear_flops", "attention_flops", "sequence_flops", "key_flops"):
        amount(getattr(made, field), f"{where} {field}")
    require(len(made.members) > 0, f"{where} members", "at least one", "none")
    for member in made.members:
        _name(member.module, f"{where} module")
        whole_number(member.axis, f"{where} axis", 0, 1)
        whole_number(member.repeats, f"{where} repeats", 1)
        _sizes(member.shape, f"{where} {member.module}")
    even = made.units % made.heads == 0
    require(even, f"{where} heads", f"a divisor of {made.units} units", made.heads)
    return made


def read_shapes(data: Any) -> dict[str, tuple[int, int]]:
    """Weights' shapes by module name. Raises ValueError."""
    return {
        _name(name, "shapes"): _sizes(shape, f"shape of {name}")
        for name, shape in dict(data).items()
    }


def read_names(data: Any) -> tuple[str, ...] | None:
    """Parameters that train. Raises ValueError."""
    if data is None:
        return None
    require(isinstance(data, list), "trainable", "a list of names", type(data).__name__)
    names = tuple(_name(name, "trainable") for name in data)
    require(len(set(names)) == len(names), "trainable", "each name once", "a name twice")
    return names


def whole_number(value: Any, argument: str, least: int, most: int = 1 << 53) -> None:
    """Raise ValueError unless ``value`` is an int from ``least`` to ``most``."""
    ok = type(value) is int and least <= value <= most
    require(ok, argument, f"a whole number from {least} to {most}", f"{value!r:.40}")


def amount(value: Any, argument: str) -> None:
    """Raise ValueError unless ``value`` is a finite number of at least 0."""
    ok = type(value) in (int, float) and 0 <= value <= 1e30 and math.isfinite(value)
    require(ok, argument, "a finite number of at least 0", f"{value!r:.40}")


def text(value: Any, argument: str) -> None:
    """Raise ValueError unless ``value`` is a short line."""
    ok = isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()
    require(ok, argument, "a short name", f"{value!r:.40}")


def _name(value: Any, argument: str) -> str:
    ok = isinstance(value, str) and len(value) <= 300 and _NAME.fullmatch(value) is not None
    require(ok, argument, "a module's dotted name", f"{value!r:.40}")
    named: str = value
    return named


def _sizes(pair: Any, argument: str) -> tuple[int, int]:
    ok = isinstance(pair, (list, tuple)) and len(pair) == 2
    require(ok, argument, "two sizes", f"{pair!r:.40}")
    for size in pair:
        whole_number(size, argument, 1, _LARGEST)
    return pair[0], pair[1]


def _require_bits(grid: Tensor, module: str) -> None:
    require(grid.dtype == torch.uint8, f"grid of {module}", "dtype torch.uint8", grid.dtype)
    highest = int(grid.max()) if grid.numel() else 0
    require(highest <= 1, f"grid of {module}", "zeros and ones", highest)
