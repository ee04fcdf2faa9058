"""``SubsetAdamW`` over BERT-base's 201 tensors against torch's AdamW over everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sensikernels._core.bits import pack_bits
from sensikernels.bench.reductions import reader
from sensikernels.bench.rows import Row, row
from sensikernels.bench.timing import Timing, interleave, ratio_band
from sensikernels.ops.subset_adamw.kept import matrix_shape
from sensikernels.optim import SubsetAdamW

SUITE = "optimizer"
LR = 1e-5
SLOW = ("foreach", "loop")
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


def with_masters(params: Sequence[nn.Parameter]) -> Step:
    """torch's fused step on float32 masters: gradients widened, then weights narrowed."""
    masters = [nn.Parameter(p.detach().float()) for p in params]
    grads = [torch.zeros_like(m) for m in masters]
    for master, grad in zip(masters, grads, strict=True):
        master.grad = grad
    weights, wide = [p.detach() for p in params], [m.detach() for m in masters]
    fused = torch.optim.AdamW(masters, lr=LR, fused=True)

    def step() -> None:
        torch._foreach_copy_(grads, [p.grad for p in params if p.grad is not None])
        fused.step()
        torch._foreach_copy_(weights, wide)

    return step


def contestants(
    params: Sequence[nn.Parameter], patterns: Sequence[str]
) -> tuple[dict[str, tuple[Step, str, float]], dict[str, Step]]:
    """Ours as {name: (step, pattern, density)}, and the baselines."""
    full, summed = subset(params, "all", 1.0), subset(params, "all", 1.0)
    clipped, sums = subset(params, "all", 1.0, max_grad_norm=1.0), statistics(params)
    fused = torch.optim.AdamW(params, lr=LR, fused=True)
    narrow = params[0].dtype != torch.float32

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
        **({"adamw-fused-master": with_masters(params)} if narrow else {}),
        "foreach": torch.optim.AdamW(params, lr=LR, foreach=True).step,
        "loop": torch.optim.AdamW(params, lr=LR, foreach=False).step,
    }


def bytes_moved(params: Sequence[Tensor], pattern: str, density: float) -> float:
    """Bytes a step cannot avoid: lines of weight (read, written) and gradient, and kept state."""
    entries = sum(p.numel() for p in params)
    width = params[0].element_size()
    # Of a line of 64 bytes with entries chosen one by one, one is enough to fetch it.
    scattered = pattern in ("columns", "elements")
    lines = 1 - (1 - density) ** (64 // width) if scattered else density
    state = 16 if width == 4 else 24  # moments, and master weights of narrow parameters
    return entries * (3 * width * lines + state * density)


def rivals_of(name: str, baselines: Iterable[str]) -> list[str]:
    """Whom a contestant of ours is held against."""
    if name == "subset-clip":
        return ["adamw-fused-clip"]
    usual = [rival for rival in baselines if rival != "adamw-fused-clip"]
    return ["subset", *usual] if name == "subset-statistics" else usual


def race(
    ours: Mapping[str, Step],
    baselines: Mapping[str, Step],
    read: Step,
    device: str,
    budget_s: float,
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Many rounds beside the fast peers, a few beside the slow ones, which would fill the time."""
    fast = {name: step for name, step in baselines.items() if name not in SLOW}
    slow = {name: step for name, step in baselines.items() if name in SLOW}
    return (
        interleave(
            {**ours, **fast, "read": read}, rounds=60, device=device, budget_s=0.7 * budget_s
        ),
        interleave({**ours, **slow}, rounds=9, warmup=1, device=device, budget_s=0.3 * budget_s),
    )


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
        read = reader([p.detach() for p in params], device)
        fast, slow = race(steps, baselines, read, device, 15.0 if quick else 40.0)
        rate = sum(p.numel() * p.element_size() for p in params) / fast["read"].median_ms
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
                    / fast[name].median_ms
                    / rate,
                    **ratio_band(times[rival], times[name]),
                },
            )
            for name, (_, pattern, density) in ours.items()
            for rival in rivals_of(name, baselines)
            for times in [slow if rival in SLOW else fast]
        ]
    progress("optimizer: sparse table")
    return [*found, sparse_table(700, 768, device)]
