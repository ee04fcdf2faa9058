"""Break-even densities, by which ``backend="auto"`` chooses: measured, or by an analytic rule.

A table is a list of break-even densities: above them dense is faster. It is looked up by what is
run, dtype, and the nearest measured block size and token count. ``<device>.json`` beside
this file ships with the package; ``sensikernels tune`` writes one for the user's device, which
wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from sensikernels._core.checks import require
from sensikernels._core.compile import constant_when_traced
from sensikernels._core.errors import DataError
from sensikernels._core.files import one_line, read_json, sealed, unsealed, write_json
from sensikernels.ops.common import blocks
from sensikernels.ops.common.choice import Choice

USER_TABLES = Path.home() / ".cache" / "sensikernels" / "dispatch"
KINDS = ("compact", "block-sparse", "selective")
FORMAT = 4
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_LARGEST = 1 << 24  # of a block's side and a token count
_REMEMBERED: list[Any] = []
F = TypeVar("F", bound=Callable[..., Any])


def remembered(function: F) -> F:
    """``function`` with its results cached until ``forget``: for what depends on a table."""
    cached = lru_cache(maxsize=4096)(function)
    _REMEMBERED.append(cached)
    return cast(F, cached)


def forget() -> None:
    """Drop what was loaded and every choice made by it."""
    for cached in _REMEMBERED:
        cached.cache_clear()


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Dense wins above ``density`` for this kind, dtype, smaller block side and token count."""

    kind: str
    dtype: str
    block: int
    tokens: int
    density: float

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "kind", "one of " + ", ".join(KINDS), self.kind)
        require(self.dtype in _DTYPES, "dtype", "one of " + ", ".join(_DTYPES), self.dtype)
        for name, least in (("block", 0), ("tokens", 1)):
            size = getattr(self, name)
            ok = type(size) is int and least <= size <= _LARGEST
            require(ok, name, f"a whole number from {least} to {_LARGEST}", size)
        ok = type(self.density) in (int, float) and 0 <= self.density <= 1
        require(ok, "density", "a share from 0 to 1", self.density)


def device_key(device: torch.device | str) -> str:
    """A file-safe name of a device model, such as ``cpu-avx512`` or ``nvidia-h200``."""
    kind = torch.device(device)
    if kind.type == "cpu":
        raw = f"cpu-{torch.backends.cpu.get_cpu_capability()}"
    else:
        raw = torch.cuda.get_device_name(kind) if kind.type == "cuda" else kind.type
    return "".join(c if c.isalnum() else "-" for c in raw.lower())


def read_table(path: Path) -> tuple[BreakEven, ...]:
    """The entries of a table file.

    Raises:
        DataError: the file is not a table, or it was edited or damaged.
    """
    try:
        body = unsealed(read_json(path), FORMAT, "measure anew: sensikernels tune")
        entries = tuple(BreakEven(**entry) for entry in body["break_even"])
        require(len(entries) > 0, "break_even", "entries", "none")
        return entries
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(f"{path}: expected a dispatch table: {why}") from error


def write_table(path: Path, table: Sequence[BreakEven], facts: dict[str, Any]) -> None:
    """Write a table and the ``facts`` of its measurement by renaming; forget what was loaded."""
    document = {"format": FORMAT, **facts, "break_even": [vars(entry) for entry in table]}
    write_json(path, sealed(document))
    forget()


@remembered
def load(device: str) -> tuple[tuple[BreakEven, ...], str]:
    """The table of a device key and where it came from; empty if there is none."""
    for folder in (USER_TABLES, Path(__file__).parent):
        path = folder / f"{device}.json"
        if path.exists():
            return read_table(path), f"measured on {device}"
    return (), "analytic"


@remembered
def break_even(
    device: torch.device, dtype: torch.dtype, kind: str, block: int, tokens_log2: int
) -> tuple[float, str]:
    """Density above which dense is faster, and where the number comes from.

    ``kind``: one of ``KINDS``. ``block``: the smaller side of a block, 0 without blocks.
    ``tokens_log2``: the token count's logarithm, rounded down. Raises UsageError.
    """
    require(kind in KINDS, "kind", "one of " + ", ".join(KINDS), kind)
    table, source = load(device_key(device))
    name = str(dtype).removeprefix("torch.")
    near = [e for e in table if (e.kind, e.dtype) == (kind, name)]
    # A table of the compiled kernels says nothing of the path taken without them.
    if near and (kind == "compact" or device.type != "cpu" or blocks.uses_native(dtype)):
        best = min(
            near,
            key=lambda e: (
                abs(math.log2(max(e.block, 1) / max(block, 1))),
                abs(math.log2(max(e.tokens, 1)) - tokens_log2),
            ),
        )
        return best.density, source
    return analytic(device, kind, block, dtype), "analytic"


@constant_when_traced
def traced_limit(device: str, dtype: torch.dtype, kind: str, block: int) -> float:
    """``break_even`` for a graph, which must not depend on a token count: a training batch's."""
    return break_even(torch.device(device), dtype, kind, block, 12)[0]


def compare(density: float, limit: float, source: str) -> str:
    """The reason of a choice made by density."""
    relation = ">" if density > limit else "<="
    return f"density {density:.3g} {relation} break-even {limit:.3g} ({source})"


def analytic(device: torch.device, kind: str, block: int, dtype: torch.dtype) -> float:
    """Break-even without a measurement.

    Blocks on a GPU are bound by L2: a product with 128 tokens by ``block`` has an intensity of
    128 b / (128 + b) FLOP per byte; at 5.5 TB/s against 550 TFLOP/s dense that is density 0.26,
    0.43 and 0.64 for blocks of 32, 64 and 128. On a CPU the compiled kernels run at the GEMM's
    own rate, and the dense form pays for unpacking the weight: it never wins, except for the
    gradient of nearly all entries. Without them a GEMM per block row costs about half more.
    """
    if kind == "compact":
        return 1.0
    if device.type == "cpu":
        if not blocks.uses_native(dtype):
            return 0.6
        return 0.9 if kind == "selective" else 1.0
    return 128 * block / (128 + block) * 5.5 / 550


TRACED = {
    (form, backend): Choice(form=form, backend=backend, reason="traced")
    for form in ("dense", "compact", "block-sparse", "selective")
    for backend in ("reference", "torch", "native", "triton")
}
"""Choices of a traced graph by form and backend: looked up, as a graph makes no object."""
