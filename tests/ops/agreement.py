"""Properties that several operators are tested for: bits on any threads, compiled steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def check_same_bits_on_any_threads(run: Callable[[], list[Tensor]]) -> None:
    """``run`` gives the same bits on one thread and on two."""
    threads = torch.get_num_threads()
    try:
        got = []
        for count in (1, 2):
            torch.set_num_threads(count)
            got.append(run())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


def check_compiles_whole(f: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> None:
    """``f`` in one graph gives the parameters of ``layer`` the gradients that it gives as it is."""
    torch.compile(f, fullgraph=True)(x).backward()
    got = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    f(x).backward()
    for one, p in zip(got, layer.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)


def check_autocast_changes_nothing(run: Callable[[], Tensor], dtype: torch.dtype) -> None:
    """``run`` gives the same bits of ``dtype`` under autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run()
    assert y.dtype == dtype
    assert torch.equal(y, run())
