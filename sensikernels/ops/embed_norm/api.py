"""``embed_norm``: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels.ops.common.choice import Choice
from sensikernels.ops.common.drops import Drop, drop_of
from sensikernels.ops.common.norms import check_eps
from sensikernels.ops.common.rowwise import choice, serving
from sensikernels.ops.embed_norm import reference
from sensikernels.ops.embed_norm.autograd import EmbedNorm
from sensikernels.ops.embed_norm.checks import check
from sensikernels.ops.embed_norm.reference import Lookup


def embed_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dropout: float = 0.0,
    eps: float = 1e-12,
    sparse: bool = False,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``dropout(LayerNorm(word[ids] + position[positions] + token_type[types]))``: BERT's input.

    Sums and statistics are float32. Saved: ids, tables (no copy), mean and 1 / standard deviation
    of each token, the seed; backward gathers the sum again and draws the mask of ``ops.dropout``
    again. A table that needs no gradient costs nothing in backward. Sums over tokens are taken in
    an order that does not depend on the number of threads (on a GPU: dense tables by atomics).

    Args:
        input_ids, position_ids, token_type_ids: int64 ``[...]`` of one shape.
        word, position, token_type: ``[V, hidden]``, ``[P, hidden]``, ``[types, hidden]`` of one
            floating dtype, which autocast does not change.
        weight, bias: ``[hidden]`` of the LayerNorm, any floating dtype.
        dropout: probability in [0, 1] of dropping an element of the result; 0 outside training.
        eps: added to the variance.
        sparse: the gradient of ``word`` is a sparse COO tensor, one entry a token and not
            coalesced, as ``nn.Embedding(sparse=True)`` gives.
        seed: int64 ``[]`` on the tables' device; drawn from torch's generator if absent.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        ``[..., hidden]`` in the tables' dtype; once differentiable.

    Raises:
        UsageError: shapes, dtypes, devices, ids or numbers do not fit (ids are checked on a CPU
            only: on a GPU that would wait for it, so such a token is NaN, and refused with
            ``SENSIKERNELS_CHECK=1``), or a backend that cannot serve.
    """
    ids, tables = (input_ids, position_ids, token_type_ids), (word, position, token_type)
    check(ids, tables, weight, bias)
    check_eps(eps)
    drop = drop_of(dropout, seed, word.device)
    chosen = serving(word, backend)
    if chosen == "reference":
        with torch.autocast(word.device.type, enabled=False):
            return reference.embed_norm(Lookup(ids, tables), weight, bias, Drop(*drop), eps, sparse)
    arguments = (*ids, *tables, weight, bias, *drop, eps, sparse, chosen)
    out: Tensor = EmbedNorm.apply(*arguments)  # type: ignore[no-untyped-call]
    return out


def explain(word: Tensor, backend: str = "auto") -> Choice:
    """The backend that serves tables like ``word``, and why.

    Raises UsageError for a named backend that cannot.
    """
    return choice(word, backend)
