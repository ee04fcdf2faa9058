"""How a right call of an operator is written down, and the tensors it is made of."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

from sensikernels import ops
from tests.ops.malformed.damage import Base

OPS = torch.ops.sensikernels
for _module in iter_modules(ops.__path__):
    import_module(f"sensikernels.ops.{_module.name}")


def operator(name: str, base: str = "", **arguments: Any) -> Base:
    """A base that calls an operator by the names of its schema."""
    accepts = frozenset(arguments.pop("accepts", ()))
    rest = {k: tuple(arguments.pop(k, ())) for k in ("indices", "ascending")}
    named = base or name
    call = getattr(OPS, name)
    return Base(name=named, call=call, arguments=arguments, accepts=accepts, **rest)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape)


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def seed() -> Tensor:
    return torch.tensor(1234)
