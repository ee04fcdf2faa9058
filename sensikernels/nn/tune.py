"""Measure on the user's device at which density dense gets faster, for ``backend="auto"``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from sensikernels._core.timing import elapsed_ms
from sensikernels.layouts import Layout, kept_values, layout_of
from sensikernels.ops.common import dispatch
from sensikernels.ops.common.dispatch import BreakEven
from sensikernels.ops.masked_linear import masked_linear
from sensikernels.ops.selective_linear import selective_linear

SHAPES = ((3072, 768), (1024, 4096))
"""Weights that are measured: one that the caches hold, one that they do not."""
GAIN = 1.05
"""What a sparse form has to gain at every shape, so that no noise makes it the choice."""
DENSITIES = (0.97, 0.9, 0.75, 0.5, 0.25, 0.1)
BLOCKS = (32, 64, 128)
TOKENS = (1, 16, 32, 64, 128, 256, 1024, 4096)
ROUNDS, SECONDS = 15, 0.2
"""Of one comparison: at most so many rounds, and after three no more once the time is spent."""


def tune(
    device: torch.device | str = "cpu",
    path: Path | None = None,
    *,
    tokens: Sequence[int] | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> Path:
    """Measure every kind of layer and write the table; its path.

    ``path`` defaults to the user's own table, which ``auto`` prefers to the one shipped. A few
    minutes; nothing else should run meanwhile.
    """
    target = path or dispatch.USER_TABLES / f"{dispatch.device_key(device)}.json"
    kind = torch.device(device).type
    dtypes = (torch.float32, torch.bfloat16)
    points = [("compact", 0), *product(("block-sparse", "selective"), BLOCKS)]
    table = []
    for (name, block), dtype, n in product(points, dtypes, tokens or TOKENS):
        kept = str(dtype).removeprefix("torch.")
        progress(f"{name} {block or ''} {kept} {n} tokens")
        limit = _break_even(name, block, dtype, n, torch.device(device))
        table.append(
            BreakEven(kind=name, dtype=kept, block=block, tokens=n, density=round(limit, 3))
        )
    facts = {
        "device": dispatch.device_key(device),
        "threads": torch.get_num_threads() if kind == "cpu" else None,
        "torch": torch.__version__,
        "shapes": SHAPES,
        "gain": GAIN,
    }
    dispatch.write_table(target, table, facts)
    return target


def _break_even(
    kind: str, block: int, dtype: torch.dtype, tokens: int, device: torch.device
) -> float:
    """The density at which the measured gains cross ``GAIN``, from the top: 0 to 1."""
    above = (1.0, 0.0)
    for density in DENSITIES:
        point = (kind, block, dtype, tokens, density, device)
        ratio = min(_ratio(shape, *point) for shape in SHAPES) / GAIN
        if ratio >= 1:
            high, worse = above
            gap = high - density
            return 1.0 if high == 1.0 else density + gap * (ratio - 1) / (ratio - worse)
        above = (density, ratio)
    return above[0] * above[1]


def _ratio(
    shape: tuple[int, int],
    kind: str,
    block: int,
    dtype: torch.dtype,
    tokens: int,
    density: float,
    device: torch.device,
) -> float:
    """Time of the dense form over time of the sparse one."""
    generator = torch.Generator().manual_seed(0)
    out, into = shape
    tile = (block, block) if block else (1, into)
    size = [-(-n // b) for n, b in zip(shape, tile, strict=True)]
    grid = torch.rand(size, generator=generator) < density
    grid.view(-1)[0] = False  # dense to the last block would be compact
    layout = layout_of(grid.to(device), tile, shape)
    weight, x, dy = (
        torch.randn(s, generator=generator).to(device, dtype)
        for s in (shape, (tokens, into), (tokens, out))
    )
    values = kept_values(weight, layout).clone()
    fast = "native" if device.type == "cpu" else "triton"
    values, x = values.requires_grad_(), x.requires_grad_()
    if kind == "selective":
        run, dense = (_selective(layout, x, weight, values, dy, f) for f in (fast, "torch"))
    else:
        run, dense = (_masked(layout, x, values, dy, name) for name in (fast, "reference"))
    return _faster(run, dense, device)


def _masked(
    layout: Layout, x: Tensor, values: Tensor, dy: Tensor, backend: str
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(
        masked_linear(x, values, layout, backend=backend), (x, values), dy
    )


def _selective(
    layout: Layout, x: Tensor, weight: Tensor, values: Tensor, dy: Tensor, form: str
) -> Callable[[], object]:
    """Only the gradient of the values differs between the forms."""
    if form == "torch":
        return lambda: kept_values(dy.T @ x.detach(), layout)
    y = selective_linear(x.detach(), weight, values, layout, backend=form)
    return lambda: torch.autograd.grad(y, values, dy, retain_graph=True)


def _faster(mine: Callable[[], object], dense: Callable[[], object], device: torch.device) -> float:
    ratios: list[float] = []
    first = time.perf_counter()
    for turn in range(ROUNDS + 1):
        if turn > 3 and time.perf_counter() - first > SECONDS:
            break
        times = []
        for run in (mine, dense):
            times.append(elapsed_ms(run, device))
        if turn:
            ratios.append(times[1] / times[0])
    return statistics.median(ratios)
