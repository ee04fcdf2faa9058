"""The tokens of a batch end to end, without the padding between sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sensikernels._core.checks import expected, require

PER_TOKEN = ("input_ids", "token_type_ids", "position_ids")


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """A batch's tokens: sequence ``i`` is ``cu_seqlens[i] .. cu_seqlens[i + 1]`` of ``[tokens]``.

    Rows after the last sequence fill the count up to a multiple. They repeat the first token, so
    every row of a table that they use is used anyway; what becomes of them is not read.
    ``places``: where each row lies in the flattened ``[rows, length]`` batch of ``shape``; rows
    of no sequence one past its end. ``rotations``: as a family's ``PackedStep`` makes them.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor
    max_length: int
    places: Tensor
    shape: tuple[int, int]
    rotations: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def first(self) -> Tensor:
        """int32 ``[rows]``: each sequence's first token."""
        return self.cu_seqlens[:-1]

    def padded(self, hidden: Tensor) -> Tensor:
        """``[tokens, hidden]`` as ``[rows, length, hidden]``, zero where no token is."""
        rows, length = self.shape
        flat = hidden.new_zeros(rows * length + 1, hidden.shape[-1])
        return flat.index_copy(0, self.places, hidden)[:-1].view(rows, length, -1)

    def averaged(self, hidden: Tensor) -> Tensor:
        """``[tokens, hidden]`` as ``[rows, hidden]``: the mean of each sequence's tokens."""
        return self.padded(hidden).sum(1) / self.cu_seqlens.diff()[:, None]


def unpadded(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    *,
    multiple: int,
    pooled: bool,
    windowed: bool = False,
) -> Tokens:
    """Tokens of HuggingFace's inputs ``[rows, length]``; reads the mask's sum on the host once.

    Raises UsageError for a mask that is not ``[rows, length]``, whose rows do not begin with a
    token where a first token is wanted (``pooled``), or with padding between tokens where their
    distance counts (``windowed``).
    """
    require(input_ids.ndim == 2, "input_ids", "[rows, length]", list(input_ids.shape))
    rows, length = input_ids.shape
    some = "at least one token"
    require(rows * length > 0, "input_ids", some, list(input_ids.shape))
    device = input_ids.device
    if attention_mask is None:
        places = torch.arange(rows * length, device=device)
        cu_seqlens = torch.arange(rows + 1, device=device, dtype=torch.int32) * length
        longest = length
    else:
        got = tuple(attention_mask.shape)
        require(got == (rows, length), "attention_mask", f"[{rows}, {length}]", list(got))
        mask = attention_mask != 0
        begun = not pooled or bool(mask[:, 0].all())
        require(begun, "attention_mask", "a token at the start of every row", "padding there")
        if windowed:
            runs = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
            between = bool((runs > 1).any())
            require(not between, "attention_mask", "no padding between tokens", "some")
        places = mask.flatten().nonzero().flatten()
        require(len(places) > 0, "input_ids", some, "padding alone")
        lengths = mask.sum(1)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        longest = int(lengths.max())
    at = F.pad(places, (0, -len(places) % multiple), value=rows * length)
    source = at.where(at < rows * length, places[:1])
    positions = source % length
    if position_ids is not None:
        positions = position_ids.expand(rows, length).flatten()[source]
    ids = input_ids.flatten()[source]
    types = torch.zeros_like(ids)
    if token_type_ids is not None:
        types = token_type_ids.expand(rows, length).flatten()[source]
    return Tokens(
        input_ids=ids.long(),
        position_ids=positions.long(),
        token_type_ids=types.long(),
        cu_seqlens=cu_seqlens,
        max_length=longest,
        places=at,
        shape=(rows, length),
    )


def packed(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    max_length: int | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
) -> Tokens:
    """Tokens as a packing collator gives them, ``[1, tokens]`` or ``[tokens]``; no host sync.

    Raises UsageError for shapes or kinds that disagree.
    """
    ids = input_ids.flatten()
    require(len(ids) == input_ids.shape[-1], "input_ids", "[1, tokens]", list(input_ids.shape))
    kind = (cu_seqlens.dtype, cu_seqlens.dim())
    require(
        kind == (torch.int32, 1),
        "cu_seqlens",
        "int32 [rows + 1]",
        f"{kind[0]} {list(cu_seqlens.shape)}",
    )
    if not isinstance(max_length, int):
        raise expected("max_length", "a Python int beside cu_seqlens", max_length)
    row = torch.arange(len(ids), device=ids.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens[1:], row, right=True)
    rows = len(cu_seqlens) - 1
    inside = sequence < rows
    offset = row - cu_seqlens[sequence]
    source = torch.where(inside, row, 0)
    if position_ids is not None:
        require(position_ids.numel() == len(ids), "position_ids", len(ids), position_ids.numel())
        offset_ids = position_ids.flatten()[source]
    else:
        offset_ids = torch.where(inside, offset, 0)
    types = torch.zeros_like(ids)
    if token_type_ids is not None:
        types = token_type_ids.flatten()[source]
    return Tokens(
        input_ids=ids[source].long(),
        position_ids=offset_ids.long(),
        token_type_ids=types.long(),
        cu_seqlens=cu_seqlens,
        max_length=max_length,
        places=torch.where(inside, sequence * max_length + offset, rows * max_length),
        shape=(rows, max_length),
    )


def to_padded(
    batch: Mapping[str, Any], *, pad_token_id: int = 0, multiple: int = 1
) -> Mapping[str, Any]:
    """A packed batch in HuggingFace's padded form; any other batch as it is.

    Padded to the longest row rounded up to ``multiple``; labels of tokens with -100.
    """
    if "cu_seqlens" not in batch:
        return batch
    cu_seqlens = batch["cu_seqlens"]
    lengths = cu_seqlens.diff()
    length = -(-int(lengths.max()) // multiple) * multiple
    mask = torch.arange(length, device=cu_seqlens.device) < lengths[:, None]
    count = batch["input_ids"].numel()
    real = int(cu_seqlens[-1])
    out: dict[str, Any] = {"attention_mask": mask.long()}
    for name, value in batch.items():
        if name in ("cu_seqlens", "max_length"):
            continue
        # Several labels a row are floats, and may be as many as the tokens.
        by_row = value.is_floating_point() and value.shape[:1] == lengths.shape
        if name in PER_TOKEN or (value.numel() == count != len(lengths) and not by_row):
            filler = {"labels": -100, "input_ids": pad_token_id}.get(name, 0)
            padded = value.new_full(mask.shape, filler)
            padded[mask] = value.flatten()[:real]
            value = padded
        out[name] = value
    return out
