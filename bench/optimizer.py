"""``SubsetAdamW`` over BERT-base's 201 tensors against torch's AdamW over everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sensikernels._bits import pack_bits
from sensikernels.bench.reductions import reader
from sensikernels.bench.rows import Row, row
from sensikernels.bench.timing import interleave
from sensikernels.ops.subset_adamw import SubsetAdamW
from sensikernels.ops.subset_adamw.kept import matrix_shape

SUITE = "optimizer"
LR = 1e-5
Step = Callable[[], object]


def bert_shapes(layers: int = 12, wide: int = 768, vocabulary: int = 30522) -> list[list[int]]:
    """Parameter shapes of a BERT classifier: 201 for the base model."""
    norm = [[wide], [wide]]
    square = [[wide, wide], [wide]]
    inner = 4 * wide
    layer = [*square * 4, *norm, [inner, wide], [inner], [wide, inner], [wide], *norm]
    tables = [[vocabulary, wide], [512, wide], [2, wide], *norm]
    return [*tables, *layer * layers, *square, [2, wide], [2]]


def parameters(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: str
) -> list[nn.Parameter]:
    """Random parameters with gradients."""
    params = [nn.Parameter((0.02 * torch.randn(s, device=device)).to(dtype)) for s in shapes]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    return params


def kept_of(pattern: str, param: Tensor, density: float) -> tuple[object, ...] | None:
    """A random ``kept`` of a pattern; tensors too small for it are frozen or kept by rows."""
    rows, columns = matrix_shape(param.shape)

    def some(units: int) -> Tensor:
        count = round(density * units)
        return torch.randperm(units)[:count].sort().values.int()

    if pattern == "elements":
        return ("elements", pack_bits(torch.rand(rows * columns) < density))
    if pattern == "columns" and param.dim() > 1:
        return ("columns", some(columns))
    if pattern == "blocks" and rows % 32 == columns % 32 == 0:
        return ("blocks", some(rows // 32 * (columns // 32)), (32, 32))
    return ("rows", some(rows))


def subset(
    params: Sequence[nn.Parameter], pattern: str, density: float, max_grad_norm: float | None = None
) -> SubsetAdamW:
    """An optimizer that keeps ``density`` of every tensor."""
    optimizer = SubsetAdamW(params, lr=LR, max_grad_norm=max_grad_norm)
    if density < 1:
        for param in params:
            optimizer.set_kept(param, kept_of(pattern, param, density))
    return optimizer


def check(shapes: Sequence[Sequence[int]], device: str) -> None:
    """No number is reported of an optimizer that is not torch's AdamW where all is kept."""
    torch.manual_seed(0)
    ours = parameters(shapes, torch.float32, device)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    for mine, other in zip(ours, theirs, strict=True):
        other.grad = mine.grad
    first, second = SubsetAdamW(ours, lr=LR), torch.optim.AdamW(theirs, lr=LR)
    for _ in range(3):
        first.step()
        second.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def statistics(params: Sequence[nn.Parameter]) -> dict[Tensor, tuple[Tensor, Tensor]]:
    """Zeroed row sums for ``fused_statistics``."""
    return {
        p: (torch.zeros(len(p), device=p.device), torch.zeros(len(p), device=p.device))
        for p in params
    }


def sparse_table(touched: int, wide: int, device: str) -> Row:
    """A table of which a step names ``touched`` rows, and torch's step on the dense gradient."""
    table = nn.Parameter(0.02 * torch.randn(30522, wide, device=device))
    dense = nn.Parameter(table.detach().clone())
    tokens = torch.randint(0, 30522, (1, touched), device=device)
    values = torch.randn(touched, wide, device=device)
    table.grad = torch.sparse_coo_tensor(tokens, values, table.shape)
    dense.grad = table.grad.to_dense()
    steps: dict[str, Step] = {
        "subset-sparse": SubsetAdamW([table], lr=LR).step,
        "adamw-fused": torch.optim.AdamW([dense], lr=LR, fused=True).step,
    }
    times = interleave(steps, device=device, budget_s=10.0)
    return row(
        candidate_time=times["subset-sparse"],
        baseline_time=times["adamw-fused"],
        suite=SUITE,
        case=f"embedding-30522x{wide}",
        candidate="subset-sparse",
        baseline="adamw-fused",
        pattern="rows",
        density=touched / 30522,
        dtype="float32",
        direction="step",
        tokens=touched,
    )


def contestants(
    params: Sequence[nn.Parameter], patterns: Sequence[str]
) -> tuple[dict[str, tuple[Step, str, float]], dict[str, Step]]:
    """Ours as {name: (step, pattern, density)}, and the baselines."""
    full, summed = subset(params, "all", 1.0), subset(params, "all", 1.0)
    clipped, sums = subset(params, "all", 1.0, max_grad_norm=1.0), statistics(params)
    fused = torch.optim.AdamW(params, lr=LR, fused=True)

    def clip_then_step() -> None:
        nn.utils.clip_grad_norm_(params, 1e9)
        fused.step()

    ours: dict[str, tuple[Step, str, float]] = {
        "subset": (full.step, "all", 1.0),
        "subset-statistics": (lambda: summed.step(fused_statistics=sums), "all", 1.0),
        "subset-clip": (clipped.step, "all", 1.0),
    }
    for pattern in patterns:
        ours[f"subset-{pattern}"] = (subset(params, pattern, 0.1).step, pattern, 0.1)
    return ours, {
        "adamw-fused": fused.step,
        "adamw-fused-clip": clip_then_step,
        "foreach": torch.optim.AdamW(params, lr=LR, foreach=True).step,
        "loop": torch.optim.AdamW(params, lr=LR, foreach=False).step,
    }


def bytes_moved(params: Sequence[Tensor], pattern: str, density: float) -> float:
    """What a step cannot avoid: lines of weight (read, written) and gradient, and kept state."""
    entries = sum(p.numel() for p in params)
    width = params[0].element_size()
    # Of a line of 64 bytes with entries chosen one by one, one is enough to fetch it.
    scattered = pattern in ("columns", "elements")
    lines = 1 - (1 - density) ** (64 // width) if scattered else density
    state = 16 if width == 4 else 24  # moments, and master weights of narrow parameters
    return entries * (3 * width * lines + state * density)


def rivals_of(name: str) -> tuple[str, ...]:
    """Whom a contestant of ours is held against."""
    if name == "subset-clip":
        return ("adamw-fused-clip",)
    usual = ("adamw-fused", "foreach", "loop")
    return ("subset", *usual) if name == "subset-statistics" else usual


def run(*, device: str, quick: bool, progress: Callable[[str], object]) -> list[Row]:
    """Rows of the full step, subsets by pattern, fused statistics, clipping and a sparse table."""
    shapes = bert_shapes(2) if quick else bert_shapes()
    progress("optimizer: check")
    check(shapes[5:24], device)
    found: list[Row] = []
    for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
        params = parameters(shapes, dtype, device)
        entries = sum(p.numel() for p in params)
        progress(f"optimizer: {len(params)} tensors, {entries / 1e6:.0f} M entries, {dtype}")
        patterns = ("rows", "elements") if quick else ("rows", "columns", "blocks", "elements")
        ours, baselines = contestants(params, patterns)
        steps = {name: step for name, (step, _, _) in ours.items()}
        seconds = 15.0 if quick else 40.0
        read = reader([p.detach() for p in params], device)
        rounds = {**steps, **baselines, "read": read}
        times = interleave(rounds, device=device, budget_s=seconds)
        rate = sum(p.numel() * p.element_size() for p in params) / times["read"].median_ms
        found += [
            row(
                candidate_time=times[name],
                baseline_time=times[rival],
                suite=SUITE,
                case="bert-2-layers" if quick else "bert-base",
                candidate=name,
                baseline=rival,
                pattern=pattern,
                density=density,
                dtype=str(dtype).removeprefix("torch."),
                direction="step",
                extra={
                    "tensors": len(params),
                    "entries": entries,
                    "read_gigabytes_per_s": rate / 1e6,
                    "share_of_read_rate": bytes_moved(params, pattern, density)
                    / times[name].median_ms
                    / rate,
                },
            )
            for name, (_, pattern, density) in ours.items()
            for rival in rivals_of(name)
        ]
    progress("optimizer: sparse table")
    return [*found, sparse_table(700, 768, device)]
