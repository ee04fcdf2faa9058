"""Registration of an operator: one schema, one implementation, and a fake that checks alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIB = torch.library.Library("sensikernels", "FRAGMENT")


def register(
    schema: str,
    checked: Callable[..., tuple[Any, ...]],
    run: Callable[..., Any],
    empty: Callable[..., Any],
) -> None:
    """Define ``sensikernels::<schema>`` on the CPU, on CUDA and for tensors without data.

    Args:
        schema: name, arguments and results.
        checked: takes the arguments, raises UsageError where they are wrong, and returns those
            that the two others take.
        run: computes the results.
        empty: allocates tensors like the results.
    """

    def implementation(*arguments: Any) -> Any:
        return run(*checked(*arguments))

    def fake(*arguments: Any) -> Any:
        return empty(*checked(*arguments))

    name = schema.partition("(")[0]
    _LIB.define(schema)
    for device in ("CPU", "CUDA"):
        _LIB.impl(name, implementation, device)
    torch.library.register_fake(f"sensikernels::{name}", fake, lib=_LIB)
