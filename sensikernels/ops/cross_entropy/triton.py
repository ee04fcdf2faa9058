"""Kernels for a GPU: a program a row, its logits read once in each direction."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sensikernels.ops.common.triton_launch import Config, on_its_device

LARGEST = 4096  # classes of a block
MEAN = Config(tile={"BLOCK": 1024}, warps=4, stages=1)


@triton.jit
def cross_entropy_kernel(x, labels, losses, stats, classes, ignored, BLOCK: tl.constexpr):
    """Loss, largest logit and log of the sum of one row; a running maximum rescales the sum."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    first = x + row * classes
    top = -float("inf")
    total = 0.0
    last = tl.where(label == ignored, 0, classes)
    for c0 in range(0, last, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        v = tl.load(first + c, mask=c < classes, other=-float("inf")).to(tl.float32)
        above = tl.maximum(top, tl.max(v, 0))
        # Nothing but -infinity so far: any shift will do, the sum is 0.
        shift = tl.where(above == -float("inf"), 0.0, above)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(v - shift), 0)
        top = above
    inside = (label >= 0) & (label < classes)
    own = tl.load(first + tl.where(inside, label, 0)).to(tl.float32)
    counted = label != ignored
    rest = tl.log(total)
    loss = tl.where(inside, (top - own) + rest, float("nan"))
    tl.store(losses + row, tl.where(counted, loss, 0.0))
    tl.store(stats + row * 2, tl.where(counted, top, 0.0))
    tl.store(stats + row * 2 + 1, tl.where(counted, rest, 0.0))


@triton.jit(do_not_specialize=["rows"])
def mean_kernel(losses, labels, loss, scale, rows, ignored, BLOCK: tl.constexpr):
    """One program: the mean over labelled rows in a fixed order, and one over their number."""
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for r0 in range(0, rows, BLOCK):
        r = r0 + tl.arange(0, BLOCK)
        total += tl.load(losses + r, mask=r < rows, other=0.0)
        count += (tl.load(labels + r, mask=r < rows, other=ignored) != ignored).to(tl.int32)
    counted = tl.sum(count, 0).to(tl.float32)
    tl.store(loss, tl.sum(total, 0) / counted)
    tl.store(scale, 1.0 / counted)


@triton.jit
def cross_entropy_backward_kernel(
    dloss, x, labels, stats, scale, dx, classes, ignored, BLOCK: tl.constexpr
):
    """A block of a row of (softmax - one at the label) · dloss · scale."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    counted = label != ignored
    at = row * classes + c
    v = tl.load(x + at, mask=(c < classes) & counted, other=-float("inf")).to(tl.float32)
    share = tl.exp((v - tl.load(stats + row * 2)) - tl.load(stats + row * 2 + 1))
    share -= tl.where(c == label, 1.0, 0.0)
    inside = (label >= 0) & (label < classes)
    share *= tl.where(inside, tl.load(dloss).to(tl.float32) * tl.load(scale), float("nan"))
    share = tl.where(counted, share, 0.0)
    tl.store(dx + at, share.to(dx.dtype.element_ty), mask=c < classes)


@on_its_device
def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, stats, scale)`` of contiguous ``logits`` and ``labels``."""
    rows, classes = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    stats = logits.new_empty((rows, 2), dtype=torch.float32)
    loss, scale = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
    if rows:
        cross_entropy_kernel[(rows,)](
            logits, labels, losses, stats, classes, ignore_index, **row_options(classes)
        )
    mean_kernel[(1,)](losses, labels, loss, scale, rows, ignore_index, **MEAN.options)
    return loss, stats, scale


@on_its_device
def cross_entropy_backward(
    dloss: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, scale: Tensor, ignore_index: int
) -> Tensor:
    """``dlogits``, from the arguments and results of ``cross_entropy``."""
    rows, classes = logits.shape
    dlogits = logits.new_empty(logits.shape)
    if rows:
        options = row_options(classes)
        cross_entropy_backward_kernel[(rows, triton.cdiv(classes, options["BLOCK"]))](
            dloss, logits, labels, stats, scale, dlogits, classes, ignore_index, **options
        )
    return dlogits


def row_options(classes: int) -> dict[str, int]:
    """The options of a launch whose programs read a row of logits by blocks."""
    block = min(max(triton.next_power_of_2(classes), 16), LARGEST)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 8), "num_stages": 1}
