"""``embed_norm``: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels._checks import require
from sensikernels._philox import DRAWS
from sensikernels.ops.common.choice import choose, described
from sensikernels.ops.embed_norm import reference
from sensikernels.ops.embed_norm.autograd import EmbedNorm


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
            only: on a GPU that would wait for it), or a backend that cannot serve.
    """
    ids, tables = (input_ids, position_ids, token_type_ids), (word, position, token_type)
    _check(ids, tables, weight, bias)
    require(0.0 <= dropout <= 1.0, "dropout", "a probability in [0, 1]", dropout)
    require(eps >= 0.0, "eps", "a number >= 0", eps)
    device = word.device
    threshold = round((1.0 - dropout) * DRAWS)
    if threshold == DRAWS:
        seed = None
    elif seed is None:
        seed = torch.randint(1 << 62, (), device=device)
    else:
        ok = seed.dtype == torch.int64 and seed.dim() == 0 and seed.device == device
        require(ok, "seed", f"int64 [] on {device}", described(seed))
    chosen, _ = choose(word, backend)
    if chosen == "reference":
        with torch.autocast(device.type, enabled=False):
            return reference.embed_norm(
                list(ids), list(tables), weight, bias, seed, threshold, eps, sparse
            )
    arguments = (*ids, *tables, weight, bias, seed, threshold, eps, sparse, chosen)
    out: Tensor = EmbedNorm.apply(*arguments)  # type: ignore[no-untyped-call]
    return out


def _check(
    ids: tuple[Tensor, ...], tables: tuple[Tensor, ...], weight: Tensor, bias: Tensor
) -> None:
    # A message is built only where it is needed: it costs more than a small call.
    word = tables[0]
    if word.dim() != 2 or not word.is_floating_point():
        require(False, "word", "floating [V, hidden]", described(word))
    hidden, device = word.shape[1], word.device
    for name, table in zip(("position", "token_type"), tables[1:], strict=True):
        ok = table.dim() == 2 and table.shape[1] == hidden and table.dtype == word.dtype
        if not ok or table.device != device:
            require(False, name, f"{word.dtype} [n, {hidden}] on {device}", described(table))
    for name, value in (("weight", weight), ("bias", bias)):
        ok = value.shape == (hidden,) and value.is_floating_point()
        if not ok or value.device != device:
            require(False, name, f"floating [{hidden}] on {device}", described(value))
    names = ("input_ids", "position_ids", "token_type_ids")
    for name, index, table in zip(names, ids, tables, strict=True):
        ok = index.dtype == torch.int64 and index.shape == ids[0].shape
        if not ok or index.device != device:
            want = f"int64 {list(ids[0].shape)} on {device}"
            require(False, name, want, described(index))
        _check_range(name, index, table.shape[0])


def _check_range(name: str, index: Tensor, count: int) -> None:
    """Raise for an id outside its table, where looking costs no synchronisation."""
    if torch.compiler.is_compiling() or index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = (int(end) for end in torch.aminmax(index))
    if low < 0 or high >= count:
        require(False, name, f"ids in [0, {count})", f"ids in [{low}, {high}]")


def explain(word: Tensor, backend: str = "auto") -> str:
    """One line: which backend serves tables like ``word``, and why."""
    name, why = choose(word, backend)
    return f"embed_norm: {name} ({why})"
