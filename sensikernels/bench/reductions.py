"""``group_reduce`` and ``select_elements`` against PyTorch's own recipes and the memory's rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sensikernels._core import extension
from sensikernels.bench.rows import Row, row
from sensikernels.bench.timing import interleave, ratio_band
from sensikernels.ops.group_reduce import GroupTable, group_reduce
from sensikernels.ops.select_kept import select_elements, select_kept

STATISTICS = ("sum_abs_wg", "sum_batch_grad_squared")
KEPT = 0.1


def bert_shapes(hidden: int, feedforward: int, layers: int) -> list[tuple[int, ...]]:
    """The parameters of a BERT with pooler and two labels: 201 tensors at 12 layers."""
    shapes: list[tuple[int, ...]] = [(30522, hidden), (512, hidden), (2, hidden)]
    shapes += [(hidden,)] * 2
    for _ in range(layers):
        shapes += [(hidden, hidden), (hidden,)] * 4 + [(hidden,)] * 2
        shapes += [(feedforward, hidden), (feedforward,), (hidden, feedforward), (hidden,)]
        shapes += [(hidden,)] * 2
    return [*shapes, (hidden, hidden), (hidden,), (2, hidden), (2,)]


def loop(weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The two row sums, tensor by tensor."""
    out = []
    for w, g in zip(weights, grads, strict=True):
        axes = tuple(range(1, w.dim()))
        out += [(w * g).abs().sum(axes), g.square().sum(axes)] if axes else [(w * g).abs(), g * g]
    return out


def loop_reused(weights: list[Tensor], grads: list[Tensor]) -> Callable[[], list[Tensor]]:
    """``loop`` as a careful user writes it: one buffer for every product, so no page is new."""
    buffer = torch.zeros(max(w.numel() for w in weights), device=weights[0].device)
    buffers = [buffer[: w.numel()].view(w.shape) for w in weights]

    def sums() -> list[Tensor]:
        out = []
        for w, g, b in zip(weights, grads, buffers, strict=True):
            axes = tuple(range(1, w.dim()))
            for x in (w, g):
                torch.mul(x, g, out=b)
                magnitude = b.abs_() if x is w else b
                out.append(magnitude.sum(axes) if axes else magnitude.clone())
        return out

    return sums


def foreach(weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The best ``_foreach`` recipe: it has no row sums, so these are sums per tensor."""
    products = torch._foreach_mul(weights, grads)
    return [*torch._foreach_norm(products, 1), *torch._foreach_norm(grads, 2)]


def reader(tensors: list[Tensor], device: str) -> Callable[[], object]:
    """Reads the bytes of ``tensors`` once, in one buffer, and does nothing else."""
    words = sum(t.numel() * t.element_size() for t in tensors) // 8
    # Written to: pages that never were are one page of zeros, which the cache holds.
    buffer = torch.ones(words, dtype=torch.int64, device=device)
    if device == "cpu" and extension.available():
        return lambda: extension.ops().read_all(buffer)
    return lambda: buffer.view(torch.float32).sum()


def check(weights: list[Tensor], grads: list[Tensor], scores: Tensor, k: int) -> None:
    """No timing of a wrong answer."""
    sums = group_reduce(weights, grads, STATISTICS, groups="row")
    for i in range(0, len(weights), 2):
        pair = loop([weights[i]], [grads[i]])
        for name, want in zip(STATISTICS, pair, strict=True):
            torch.testing.assert_close(sums.view(name, i), want, rtol=1e-4, atol=1e-5)
    kept = select_elements([scores], k=k)
    if int(kept.counts.sum()) != k or float(scores.topk(k).values[-1]) != float(kept.threshold):
        raise AssertionError("select_elements: not the k best")


def reduction_rows(
    weights: list[Tensor], grads: list[Tensor], device: str, seconds: float
) -> list[Row]:
    """Row sums of every tensor, beside the loop, foreach and a bare read of the same bytes."""
    table = GroupTable(weights, grads, groups="row")
    contestants: dict[str, Callable[[], object]] = {
        "group_reduce": lambda: group_reduce(weights, grads, STATISTICS, table=table),
        "loop": lambda: loop(weights, grads),
        "loop-reused": loop_reused(weights, grads),
        "foreach": lambda: foreach(weights, grads),
        "read": reader([*weights, *grads], device),
    }
    times = interleave(contestants, rounds=30, warmup=1, device=device, budget_s=seconds)
    moved = sum(t.numel() * t.element_size() for t in (*weights, *grads))
    return [
        row(
            suite="reductions",
            case="row_sums",
            candidate="group_reduce",
            baseline=name,
            candidate_time=times["group_reduce"],
            baseline_time=times[name],
            pattern="rows",
            density=1.0,
            dtype="float32",
            direction="score",
            extra={
                "tensors": len(weights),
                "gigabytes_per_s": moved / times["group_reduce"].median_ms / 1e6,
                "read_gigabytes_per_s": moved / times["read"].median_ms / 1e6,
                "share_of_read_rate": times["read"].median_ms / times["group_reduce"].median_ms,
                **ratio_band(times[name], times["group_reduce"]),
            },
        )
        for name in ("loop", "loop-reused", "foreach", "read")
    ]


def threshold_rows(scores: Tensor, k: int, device: str, seconds: float) -> list[Row]:
    """The best tenth of all entries, beside topk, kthvalue and a bare read of the scores."""
    lowest = scores.numel() - k + 1
    contestants: dict[str, Callable[[], object]] = {
        "select_elements": lambda: select_elements([scores], k=k),
        "topk": lambda: torch.topk(scores, k, sorted=False),
        "kthvalue": lambda: torch.kthvalue(scores, lowest),
        "read": reader([scores], device),
    }
    times = interleave(contestants, rounds=7, warmup=0, device=device, budget_s=seconds)
    passes = times["select_elements"].median_ms / times["read"].median_ms
    return [
        row(
            suite="reductions",
            case="threshold",
            candidate="select_elements",
            baseline=name,
            candidate_time=times["select_elements"],
            baseline_time=times[name],
            pattern="elements",
            density=KEPT,
            dtype="float32",
            direction="select",
            extra={
                "entries": scores.numel(),
                "streaming_passes": passes,
                "share_of_read_rate": 1 / passes,
                **ratio_band(times[name], times["select_elements"]),
            },
        )
        for name in ("topk", "kthvalue", "read")
    ]


def group_rows(device: str, layers: int, seconds: float) -> list[Row]:
    """Units of a whole model under a FLOPs budget, beside topk on the same scores."""
    heads, neurons = 16, 4096
    kinds = torch.tensor(([0] * heads + [1] * neurons) * layers, device=device)
    sizes = torch.tensor([heads, neurons] * layers, device=device)
    segments = torch.repeat_interleave(torch.arange(2 * layers, device=device), sizes)
    costs = torch.where(kinds == 0, 64 * (8 * 1024 + 4 * 128), 4 * 1024)
    scores = torch.rand(len(kinds), device=device)
    budget, k = 0.5 * float(costs.sum()), len(kinds) // 2
    arguments: dict[str, Any] = {"segments": segments, "n_segments": 2 * layers}
    contestants: dict[str, Callable[[], object]] = {
        "select_kept": lambda: select_kept(
            scores, costs=costs, budget=budget, kinds=kinds, minimum=1, **arguments
        ),
        "topk": lambda: torch.topk(scores, k),
    }
    times = interleave(contestants, rounds=15, device=device, budget_s=seconds)
    return [
        row(
            suite="reductions",
            case="unit_budget",
            candidate="select_kept",
            baseline="topk",
            candidate_time=times["select_kept"],
            baseline_time=times["topk"],
            pattern="units",
            density=0.5,
            dtype="float32",
            direction="select",
            extra={"units": len(kinds)},
        )
    ]


def run(*, device: str, quick: bool, progress: Callable[[str], object]) -> list[Row]:
    """BERT-base's 201 tensors; ``quick`` keeps to two layers and a tenth of the entries."""
    layers = 2 if quick else 12
    progress("reductions: row sums")
    shapes = bert_shapes(768, 3072, layers)
    weights, grads = ([torch.randn(s, device=device) for s in shapes] for _ in range(2))
    scores = torch.rand(1_080_000 * (10 if quick else 100), device=device)
    k = int(KEPT * scores.numel())
    check(weights, grads, scores, k)
    rows = reduction_rows(weights, grads, device, 8 if quick else 25)
    del weights, grads
    progress("reductions: threshold")
    rows += threshold_rows(scores, k, device, 10 if quick else 45)
    progress("reductions: unit budget")
    return rows + group_rows(device, 24, 5)
