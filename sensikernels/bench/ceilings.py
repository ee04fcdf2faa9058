"""Ceilings of this machine: ``python -m sensikernels.bench.ceilings [--device cuda]``.

Rates of memory, L2 and matrix products, and the cost of a launch, measured in the run whose figures
are held against them. Bytes of a copy count read and written. Products are random numbers: zeros
run faster.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels._core import extension
from sensikernels._core.products import float32_products
from sensikernels.bench.rows import write_json
from sensikernels.bench.timing import Timing, interleave

BERT = ((768, 768), (768, 2304), (768, 3072), (3072, 768))
LAUNCHES = 1000
Ceiling = dict[str, Any]
Work = dict[str, tuple[Callable[[], object], float]]
"""Name: what to run, and the bytes or operations it does."""


def measure(device: str, quick: bool) -> list[Ceiling]:
    """Every ceiling of ``device`` as ``{name, value, unit, spread, n}``."""
    found = memory(device, quick) + products(device, quick)
    return found + (launches() if device != "cpu" else [operator_call()])


def memory(device: str, quick: bool) -> list[Ceiling]:
    """Copy and read of a buffer far larger than any cache; on a GPU also of one in the L2."""
    gibibytes = 2 if device != "cpu" else 1 / 4 if quick else 1
    source = torch.ones(int(gibibytes * 2**30) // 4, device=device)
    target = torch.empty_like(source)
    size = source.numel() * 4
    work: Work = {
        "copy": (lambda: target.copy_(source), 2 * size),
        "read": (_reader(source), size),
    }
    if device != "cpu":
        from sensikernels.bench.triton_ceilings import L2Reader

        for mebibytes in (12, 24):
            reader = L2Reader(mebibytes)
            if not reader.right():
                raise AssertionError("the L2 reader did not read everything")
            work[f"l2-read-{mebibytes}-mib"] = (reader, reader.bytes_read)
    return _rates(work, device, "GB/s", 1e9, rounds=10)


def _reader(source: Tensor) -> Callable[[], object]:
    if source.device.type == "cpu" and extension.available():
        words = source.view(torch.int64)
        return lambda: extension.ops().read_all(words)
    return source.sum


def products(device: str, quick: bool) -> list[Ceiling]:
    """Dense products: one large cube, and the linears of BERT-base with their weight gradients."""
    on_gpu = device != "cpu"
    tokens, cube = (4096, 8192) if on_gpu else (256, 512) if quick else (1024, 1024)
    found = []
    for dtype in (torch.bfloat16,) if on_gpu else (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        work: Work = {}
        for rows, into, out in [(cube, cube, cube), *((tokens, i, o) for i, o in BERT)]:
            x, weight, dy = (
                torch.randn(s, device=device).to(dtype)
                for s in ((rows, into), (out, into), (rows, out))
            )
            label = f"{name}-{rows}x{into}x{out}"
            operations = 2.0 * rows * into * out
            work[f"gemm-{label}"] = (_product(x, weight), operations)
            if rows == tokens:
                work[f"gemm-dw-{label}"] = (_product(dy.T, x.T), operations)
        found += _rates(work, device, "TFLOP/s", 1e12, rounds=5 if quick else 15)
    return found


def _product(x: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: F.linear(x, weight)


def _rates(work: Work, device: str, unit: str, scale: float, *, rounds: int) -> list[Ceiling]:
    runs = {name: run for name, (run, _) in work.items()}
    times = interleave(runs, rounds=rounds, warmup=2, device=device, budget_s=20.0)
    return [
        _ceiling(name, amount / times[name].median_ms * 1e3 / scale, unit, times[name])
        for name, (_, amount) in work.items()
    ]


def _ceiling(name: str, value: float, unit: str, timing: Timing) -> Ceiling:
    facts = {"name": name, "value": value, "unit": unit, "median_ms": timing.median_ms}
    return {**facts, "spread": timing.spread, "n": timing.n}


def launches() -> list[Ceiling]:
    """Microseconds a kernel costs: launched by torch, by triton, and inside a graph."""
    from sensikernels.bench.triton_ceilings import launch

    one = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    one.add_(1)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            one.add_(1)

    def repeat(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: [call() for _ in range(LAUNCHES)]

    runs: dict[str, Callable[[], object]] = {
        "launch-eager": repeat(lambda: one.add_(1)),
        "launch-triton": repeat(partial(launch, one)),
        "launch-graph": graph.replay,
    }
    times = interleave(runs, rounds=10, device="cuda", clock="wall")
    return [_ceiling(n, t.median_ms * 1e3 / LAUNCHES, "us", t) for n, t in times.items()]


def operator_call() -> Ceiling:
    """Microseconds of the smallest operator on a CPU."""
    one = torch.zeros(1)
    times = interleave({"call": lambda: [one.add_(1) for _ in range(LAUNCHES)]}, rounds=10)
    timing = times["call"]
    return _ceiling("operator-call", timing.median_ms * 1e3 / LAUNCHES, "us", timing)


def main() -> int:
    """Print the ceilings, and write them where ``--json`` says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    with float32_products(given.device):
        found = measure(given.device, given.quick)
    for one in found:
        print(f"{one['name']:<32} {one['value']:9.3f} {one['unit']}")
    print(f"{time.perf_counter() - start:.1f} s")
    if given.json:
        write_json(given.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
