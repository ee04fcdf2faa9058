"""The definition, in plain PyTorch that autograd differentiates."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._core.philox import DRAWS, philox
from sensikernels.ops.varlen_attention.call import Call
from sensikernels.ops.varlen_attention.layout import pad, unpad

TILE_ROWS, LANES = 8, 16


def draws(seed: Tensor, starts: Tensor, heads: int, queries: int, keys: int) -> Tensor:
    """int64 ``[n, heads, queries, keys]`` in [0, 65536).

    Tile (t, b) is 8 query rows by 16 keys of a sequence whose queries start at packed row
    ``start``: key 16 b + lane has counter ((head 2²⁸ + start + t) 2²⁰ + b) 2⁴ + lane, row
    8 t + 4 h + w takes half h of its word w. Tiles of different sequences differ, for a sequence
    has more rows than tiles.
    """

    def count(n: int) -> Tensor:
        return torch.arange(n, device=starts.device)

    rows, columns = -(-queries // TILE_ROWS), -(-keys // LANES)
    head = count(heads)[:, None, None, None] << 28
    tile = starts.long()[:, None, None, None, None] + count(rows)[:, None, None]
    block = count(columns)[:, None]
    counter = ((((head | tile) << 20) | block) << 4) | count(LANES)
    words = torch.stack(philox(seed, counter), 3)
    both = torch.cat([words & 0xFFFF, words >> 16], 3)
    shape = (len(starts), heads, rows * TILE_ROWS, columns * LANES)
    return both.reshape(shape)[:, :, :queries, :keys]


def dropped(p: Tensor, seed: Tensor, starts: Tensor, threshold: int) -> Tensor:
    """``p [n, heads, queries, keys]`` times 65536 / threshold where the draw is below it, or 0."""
    if threshold == DRAWS:
        return p
    scale = DRAWS / threshold if threshold else 0.0
    kept = draws(seed, starts, *p.shape[1:]) < threshold
    return torch.where(kept, p * scale, p.new_zeros(()))


def beyond(window: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """bool ``[queries, keys]``: the key is more than ``window`` places from the query."""
    place = torch.arange(queries, device=device)[:, None]
    return (place - torch.arange(keys, device=device)).abs() > window


def varlen_attention(call: Call) -> Tensor:
    """dropout(softmax(scale Q Kᵀ)) V of each sequence and head, ``[tokens_q, heads, vo_size]``.

    The softmax is taken over the keys within the window; a query without any gives zero.
    """
    query, key, value, cu_query, cu_key, *_ = call
    queries = pad(cu_query[:-1], cu_query[1:], call.max_query, len(query))
    keys = pad(cu_key[:-1], cu_key[1:], call.max_key, len(key))
    scores = queries.gather(query) @ keys.gather(key).transpose(2, 3) * call.scale
    outside = ~keys.inside[:, None, None, :]
    if call.window is not None:
        outside = outside | beyond(call.window, call.max_query, call.max_key, query.device)
    p = torch.softmax(scores.masked_fill(outside, torch.finfo(scores.dtype).min), -1)
    p = dropped(p.masked_fill(outside, 0.0), call.seed, cu_query[:-1], call.threshold)
    return unpad(p @ keys.gather(value), cu_query, len(query))
