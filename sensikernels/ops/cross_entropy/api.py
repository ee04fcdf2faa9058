"""``cross_entropy``: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels.ops.common.choice import Choice
from sensikernels.ops.common.rowwise import choice, serving
from sensikernels.ops.cross_entropy import checks, reference
from sensikernels.ops.cross_entropy.autograd import CrossEntropy


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, backend: str = "auto"
) -> Tensor:
    """Mean over labelled rows of ``logsumexp(logits) - logits[label]``.

    Forward and backward read the logits once each. Saved for backward, beside logits and labels:
    two float32 a row. Sums are taken in float32, in an order that does not depend on the number
    of threads. Nothing waits for the device: the number of labelled rows stays there.

    Args:
        logits: ``[rows, classes]``, a floating dtype; under autocast it keeps its dtype.
        labels: int64 or int32 ``[rows]``: a class, or ``ignore_index``. Ignored rows are not read
            and get gradient 0.
        ignore_index: the label of rows that do not count.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        float32 ``[]`` (float64 for such logits); NaN where no row counts, as PyTorch's. Once
        differentiable (the reference to any order).

    Raises:
        UsageError: shapes, dtypes or devices do not fit; a backend that cannot serve; on a CPU, a
            label that is neither a class nor ``ignore_index``. On a GPU, where finding out would
            wait, such a label makes the loss and its row's gradient NaN, and reads no foreign
            memory; with ``SENSIKERNELS_CHECK=1`` it is refused there too.
    """
    checks.check(logits, labels)
    labels = labels.long()
    chosen = serving(logits, backend)
    checks.check_labels(labels, logits.shape[1], ignore_index, chosen)
    if chosen == "reference":
        with torch.autocast(logits.device.type, enabled=False):
            return reference.cross_entropy(logits, labels, ignore_index)[0]
    out: Tensor = CrossEntropy.apply(logits, labels, ignore_index, chosen)  # type: ignore[no-untyped-call]
    return out


def explain(logits: Tensor, backend: str = "auto") -> Choice:
    """The backend that serves ``logits``, and why; UsageError for a named one that cannot."""
    return choice(logits, backend)
