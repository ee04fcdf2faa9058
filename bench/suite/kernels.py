"""Short cases of every compiled kernel, for compute-sanitizer: ``python -m bench.suite.kernels``.

Sizes are small and odd, so that tails run. Each case is held against the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels._core.bits import pack_bits
from sensikernels.ops.group_reduce import STATISTICS, group_reduce
from sensikernels.ops.select_kept import select_elements, select_kept
from sensikernels.optim import SubsetAdamW

SHAPES = ((67, 130), (129,), (64, 96), (1,), (3, 1030))


def reductions(device: str, dtype: torch.dtype) -> None:
    """Every statistic by row, column and block."""
    weights, grads = ([torch.randn(s, device=device).to(dtype) for s in SHAPES] for _ in range(2))
    for groups in ("tensor", "row", "column"):
        got, want = (
            group_reduce(weights, grads, STATISTICS, groups=groups, backend=backend)
            for backend in ("native", "reference")
        )
        for name in STATISTICS:
            torch.testing.assert_close(got.flat(name), want.flat(name), rtol=1e-3, atol=1e-3)


def elements(device: str, dtype: torch.dtype) -> None:
    """Ties, a tail and two tensors."""
    scores = [torch.randn(n, device=device).mul_(4).round_().to(dtype) for n in (4099, 31)]
    got, want = (select_elements(scores, k=700, backend=b) for b in ("native", "reference"))
    for tensor in range(len(scores)):
        if not torch.equal(got.packed(tensor), want.packed(tensor)):
            raise AssertionError("select_elements: other entries than the reference's")


def units(device: str, dtype: torch.dtype) -> None:
    """Counts, chunks, a greedy fill and two kinds: what this device runs, and the definition."""
    sizes = torch.tensor([5, 131, 64, 1])
    segments = torch.repeat_interleave(torch.arange(4), sizes)
    n = len(segments)
    scores = torch.randn(n).mul_(4).round_().to(dtype)
    problems: list[dict[str, Any]] = [
        {"k": 77},
        {"k": 77, "multiple": 16, "minimum": 1},
        {"k": torch.tensor([2, 40, 64, 0]), "scope": "per_segment"},
        {"costs": 1.0 + torch.arange(n) % 7, "budget": 300.0, "multiple": 8},
        {
            "costs": torch.where(segments % 2 == 0, 9.0, 2.0),
            "budget": 300.0,
            "kinds": segments % 2,
            "minimum": 1,
        },
    ]
    for problem in problems:
        given: dict[str, Any] = {"segments": segments, "n_segments": 4, **problem}
        want = select_kept(scores, **given, backend="reference")
        there: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()
        }
        got = select_kept(scores.to(device), **there)
        for name in ("bits", "indices", "counts"):
            if not torch.equal(getattr(got, name).cpu(), getattr(want, name)):
                raise AssertionError(f"select_kept: other {name} than the reference's: {problem}")


def optimizer(device: str, dtype: torch.dtype) -> None:
    """Every pattern of kept entries, with clipping; then a table updated by rows."""
    kept: dict[str, tuple[object, ...] | None] = {
        "all": None,
        "rows": ("rows", _index(device, 0, 5, 66)),
        "columns": ("columns", _index(device, 1, 64, 129)),
        "blocks": ("blocks", _index(device, 0, 2), (32, 32)),
        "elements": ("elements", pack_bits(torch.rand(67 * 130) < 0.3).to(device)),
    }
    for pattern, units in kept.items():
        shape = (64, 96) if pattern == "blocks" else (67, 130)
        start, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        got, want = (_stepped(start, grad, units, b) for b in ("native", "reference"))
        torch.testing.assert_close(
            got, want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6
        )
    rows = torch.tensor([[3, 0, 3, 40]], device=device)
    table, values = torch.randn(41, 33, device=device), torch.randn(4, 33, device=device)
    sparse = torch.sparse_coo_tensor(rows, values, table.shape)
    got, want = (_stepped(table, sparse, None, b) for b in ("native", "reference"))
    torch.testing.assert_close(got, want)


def _index(device: str, *units: int) -> Tensor:
    return torch.tensor(units, dtype=torch.int32, device=device)


def _stepped(start: Tensor, grad: Tensor, kept: tuple[object, ...] | None, backend: str) -> Tensor:
    param = nn.Parameter(start.clone())
    made = SubsetAdamW(
        [param], lr=1e-2, backend=backend, max_grad_norm=None if grad.is_sparse else 1.0
    )
    if kept is not None:
        made.set_kept(param, kept)
    for _ in range(2):
        param.grad = grad.clone()
        made.step()
    made.flush()
    return param.detach()


CASES: dict[str, Callable[[str, torch.dtype], None]] = {
    "group_reduce": reductions,
    "select_elements": elements,
    "select_units": units,
    "subset_adamw": optimizer,
}


def run_all(device: str) -> list[str]:
    """Run every case in float32 and bfloat16; returns what ran. Raises AssertionError."""
    torch.manual_seed(0)
    ran = []
    for name, case in CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            case(device, dtype)
            ran.append(f"{name} {str(dtype).removeprefix('torch.')}")
    if device != "cpu":
        torch.cuda.synchronize()
    return ran


def main() -> int:
    """Run them and say so."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    print("\n".join(run_all(parser.parse_args().device)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
