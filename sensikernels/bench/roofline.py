"""The roofline picture: ``python -m sensikernels.bench.roofline linear.json --picture roof.png``.

Rates of the linear rows over their intensity, under the ceilings measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sensikernels.bench.timing import Timing, interleave

INK = "#222222"


@cache
def roof(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """This run's ceilings: GFLOP/s of a large product in ``dtype``, GB/s of a large copy."""
    size = 4096 if device != "cpu" else 768
    x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.ones((1 << 28 if device != "cpu" else 1 << 24), device=device)
    target = torch.empty_like(source)
    runs = {"gemm": lambda: F.linear(x, weight), "copy": lambda: target.copy_(source)}
    times = interleave(runs, rounds=9, warmup=1, device=device, budget_s=0.3)
    copied = 2 * source.numel() * source.element_size()
    return 2 * size**3 / times["gemm"].median_ms / 1e6, copied / times["copy"].median_ms / 1e6


def achieved(work: tuple[float, float], time: Timing, gemm: float, copy: float) -> dict[str, float]:
    """Rates of ``work`` (FLOPs, bytes), and their share of what the roof allows it."""
    flops, moved = work
    gflops = flops / time.median_ms / 1e6
    return {
        "gflops": gflops,
        "gb_per_s": moved / time.median_ms / 1e6,
        "flop_per_byte": flops / moved,
        "gemm_gflops": gemm,
        "copy_gb_per_s": copy,
        "share_of_ceiling": gflops / min(gemm, copy * flops / moved),
    }


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel a dtype: every candidate of ``rows`` (as ``bench linear --json`` writes them).

    Raises:
        ValueError: no row holds a rate and its ceilings.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    once = {
        (r["candidate"], r["case"], r["dtype"], r["direction"]): r
        for r in rows
        if "share_of_ceiling" in r
    }
    dtypes = sorted({key[2] for key in once})
    if not dtypes:
        raise ValueError("rows: expected some of the linear suite, got none with ceilings")
    figure = Figure(figsize=(5.5 * len(dtypes), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(dtypes), squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        own = [r for r in once.values() if r["dtype"] == dtype]
        gemm, copy = (max(r[name] for r in own) for name in ("gemm_gflops", "copy_gb_per_s"))
        for candidate in sorted({r["candidate"] for r in own}):
            mine = [r for r in own if r["candidate"] == candidate]
            axes.loglog(
                [r["flop_per_byte"] for r in mine],
                [r["gflops"] for r in mine],
                "o",
                ms=4,
                alpha=0.7,
                label=candidate,
            )
        low, high = (f(r["flop_per_byte"] for r in own) for f in (min, max))
        ends = sorted({low / 2, gemm / copy, high * 2})
        axes.loglog(ends, [min(gemm, copy * x) for x in ends], color=INK, lw=1)
        axes.set_title(f"{dtype}: {gemm:.0f} GFLOP/s, {copy:.0f} GB/s", loc="left", color=INK)
        axes.set_xlabel("FLOP per byte, each operand moved once")
        axes.grid(True, which="both", alpha=0.15)
    panels[0].set_ylabel("GFLOP/s of kept work")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150, format="png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the rows of a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", type=Path, help="what `bench linear --json` wrote")
    parser.add_argument("--picture", type=Path, required=True, help="the PNG to write")
    given = parser.parse_args(arguments)
    try:
        draw(json.loads(given.rows.read_text()), given.picture)
    except (OSError, ValueError, ImportError) as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
