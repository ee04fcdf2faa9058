"""The arguments of one call, as the kernels take them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """The operator's arguments in its order, the backend aside.

    Operands have a unit last stride, offsets are contiguous; queries have offsets of their own or
    those of the keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cu_query: Tensor
    cu_key: Tensor
    seed: Tensor
    max_query: int
    max_key: int
    threshold: int
    scale: float
    window: int | None

    @property
    def nothing(self) -> bool:
        """True if there is no product to take."""
        sizes = self.max_query, self.max_key, *(x.numel() for x in self[:3])
        return not all(sizes)


def call_of(
    query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor | None, cu_key: Tensor, *rest: Any
) -> Call:
    """The call that an operator's arguments describe; without ``cu_query`` queries are the keys."""
    cu_key = cu_key.contiguous()
    cu_query = cu_key if cu_query is None else cu_query.contiguous()
    return Call(unit_stride(query), unit_stride(key), unit_stride(value), cu_query, cu_key, *rest)


def unit_stride(x: Tensor) -> Tensor:
    """``x [tokens, heads, size]`` with neighbours of a head side by side in memory."""
    return x if x.stride(2) == 1 else x.contiguous()
