"""Attention of sequences of about one length together, by products and a softmax of torch.

On the CPU one bucket per length rounded up to 8, or views of the operands where all sequences have
one length; elsewhere one bucket in all, for lengths are not read back from a device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sensikernels._core import extension
from sensikernels._core.philox import DRAWS
from sensikernels.ops.varlen_attention import reference
from sensikernels.ops.varlen_attention.call import Call
from sensikernels.ops.varlen_attention.layout import Padded, Whole, pad

ROUND = 8


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Some sequences: the places of their queries and keys, and their first query rows."""

    queries: Padded | Whole
    keys: Padded | Whole
    starts: Tensor

    def probabilities(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """``(P, Q, K)``, padded."""
        q, k = self.queries.gather(call.query), self.keys.gather(call.key)
        scores = torch.matmul(q * call.scale, k.transpose(2, 3))
        lowest = torch.finfo(scores.dtype).min
        if isinstance(self.keys, Padded):
            scores = scores.masked_fill_(~self.keys.inside[:, None, None, :], lowest)
        if call.window is None:
            return torch.softmax(scores, -1), q, k
        outside = reference.beyond(call.window, scores.shape[2], scores.shape[3], scores.device)
        if isinstance(self.keys, Padded):
            outside = outside | ~self.keys.inside[:, None, None, :]
        p = torch.softmax(scores.masked_fill_(outside, lowest), -1)
        # A query without keys has equal scores.
        return p.masked_fill_(outside, 0.0), q, k


def buckets(call: Call) -> Iterator[Bucket]:
    """The non-empty sequences, bucket by bucket."""
    cu_query, cu_key = call.cu_query, call.cu_key
    spans = [cu_query[:-1], cu_query[1:], cu_key[:-1], cu_key[1:]]
    groups: dict[tuple[int, int], list[int] | None] = {(call.max_query, call.max_key): None}
    if cu_query.device.type == "cpu":
        lengths = [(spans[i + 1] - spans[i]).tolist() for i in (0, 2)]
        if all(lengths) and all(min(one) == max(one) > 0 for one in lengths):
            whole = (Whole(n=len(one), length=one[0]) for one in lengths)
            yield Bucket(queries=next(whole), keys=next(whole), starts=spans[0])
            return
        groups = _by_length(*lengths)
    for (queries, keys), which in groups.items():
        mine = spans
        if which is not None:
            index = torch.tensor(which)
            mine = [span[index] for span in spans]
        if queries and keys and mine[0].numel():
            yield Bucket(
                queries=pad(mine[0], mine[1], queries, len(call.query)),
                keys=pad(mine[2], mine[3], keys, len(call.key)),
                starts=mine[0],
            )


def _by_length(queries: list[int], keys: list[int]) -> dict[tuple[int, int], list[int] | None]:
    grouped: dict[tuple[int, int], list[int]] = defaultdict(list)
    for s, pair in enumerate(zip(queries, keys, strict=True)):
        a, b = (-(-length // ROUND) * ROUND for length in pair)
        grouped[min(a, max(queries)), b].append(s)
    return dict(grouped)


def forward(call: Call) -> Tensor:
    """``out [tokens_q, heads, vo_size]``, without autograd."""
    out = _rows_and_one(call.query, call.value.shape[2])
    for bucket in buckets(call):
        p, _, _ = bucket.probabilities(call)
        p = _dropped(p, bucket, call)
        bucket.queries.scatter(torch.matmul(p, bucket.keys.gather(call.value)), out)
    return out[:-1]


def backward(dout: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)``: P is computed again."""
    dq, dk, dv = (_rows_and_one(x, x.shape[2]) for x in call[:3])
    for bucket in buckets(call):
        p, q, k = bucket.probabilities(call)
        d, v = bucket.queries.gather(dout), bucket.keys.gather(call.value)
        g = _dropped(torch.matmul(d, v.transpose(2, 3)), bucket, call)
        ds = torch.ops.aten._softmax_backward_data(g, p, -1, p.dtype).mul_(call.scale)
        p = _dropped(p, bucket, call)
        bucket.queries.scatter(torch.matmul(ds, k), dq)
        bucket.keys.scatter(torch.matmul(ds.transpose(2, 3), q), dk)
        bucket.keys.scatter(torch.matmul(p.transpose(2, 3), d), dv)
    return dq[:-1], dk[:-1], dv[:-1]


def _rows_and_one(like: Tensor, size: int) -> Tensor:
    """Zeros ``[tokens + 1, heads, size]``: the last row takes what belongs nowhere."""
    return like.new_zeros(like.shape[0] + 1, like.shape[1], size)


def _dropped(p: Tensor, bucket: Bucket, call: Call) -> Tensor:
    """``reference.dropped``; the compiled kernel overwrites ``p``."""
    seed, threshold = call.seed, call.threshold
    compiled = p.device.type == "cpu" and p.dtype in (torch.float32, torch.bfloat16)
    if threshold == DRAWS or not (compiled and extension.available()):
        return reference.dropped(p, seed, bucket.starts, threshold)
    p = p.contiguous()
    extension.ops().varlen_attention_drop(p, bucket.starts.contiguous(), seed, threshold)
    return p
