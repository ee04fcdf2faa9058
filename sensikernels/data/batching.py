"""Tokenise once, batch by length, pad little or not at all, and let batch shapes repeat.

Padded lengths are multiples of ``pad_to_multiple``, packed token counts of ``multiple``, so a run
sees a handful of shapes: on a CPU oneDNN compiles a product per shape, on a GPU a graph is
captured per shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from sensikernels._core.checks import require
from sensikernels._core.shapes import MULTIPLE
from sensikernels.data.packing import collate_packed, round_up
from sensikernels.data.rows import IGNORED, Encoded, Per, TokenRow, labels_of
from sensikernels.data.sampling import LengthBucketSampler, Order, TokenBudgetSampler
from sensikernels.masks.geometry import Geometry, count_shapes

if TYPE_CHECKING:
    from typing_extensions import Unpack


def collate(
    rows: Sequence[TokenRow], *, pad_token_id: int, pad_to_multiple: int = 8, per: Per = "row"
) -> dict[str, torch.Tensor]:
    """One batch, padded to its longest row rounded up to ``pad_to_multiple``.

    ``input_ids``, ``token_type_ids`` (if the tokenizer gives them) and ``attention_mask`` are
    int64 ``[rows, length]``; ``labels`` is ``[rows]``, int64 classes or float32 scores, or
    float32 ``[rows, names]``; ``per`` token int64 ``[rows, length]``, -100 at padding; ``per`` span
    ``start_positions`` and ``end_positions``, int64 ``[rows]``, take its place.
    """
    length = round_up(max(len(row.input_ids) for row in rows), pad_to_multiple)
    ids = np.full((len(rows), length), pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.input_ids)] = row.input_ids
        mask[i, : len(row.input_ids)] = 1
    batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if rows[0].token_type_ids is not None:
        types = np.zeros_like(ids)
        for i, row in enumerate(rows):
            types[i, : len(row.input_ids)] = row.token_type_ids
        batch["token_type_ids"] = torch.from_numpy(types)

    def padded(labels: Sequence[Any]) -> torch.Tensor:
        line = np.full_like(ids, IGNORED)
        for i, row in enumerate(labels):
            line[i, : len(row)] = row
        return torch.from_numpy(line)

    return batch | labels_of(rows, per, padded)


class Batches(DataLoader[Any]):
    """A DataLoader over tokenised rows, ready for ``accelerate``'s ``prepare``.

    Iterating never touches the global random state: a DataLoader without a generator of its own
    draws from it, and a resumed run would then see other dropout masks.
    """

    order: LengthBucketSampler | TokenBudgetSampler

    def __init__(
        self,
        encoded: Encoded,
        *,
        batch_size: int | None = None,
        tokens: int | None = None,
        packed: bool = False,
        pad_to_multiple: int = 8,
        multiple: int = MULTIPLE,
        **order: Unpack[Order],
    ) -> None:
        """Batches of ``batch_size`` rows or, packed, of at most ``tokens`` tokens.

        ``packed``: collated by ``collate_packed`` to a ``multiple`` of tokens, else by ``collate``.
        ``order``: see ``sampling.Order``. Raises UsageError as the samplers do, and unless exactly
        one of ``batch_size`` and ``tokens`` is given.
        """
        require(pad_to_multiple >= 1, "pad_to_multiple", "at least 1", pad_to_multiple)
        require(multiple >= 1, "multiple", "at least 1", multiple)
        if tokens is None:
            require(batch_size is not None, "batch_size", "rows, or tokens", "neither")
            self.order = LengthBucketSampler(encoded.lengths, batch_size or 0, **order)
        else:
            require(batch_size is None, "batch_size", "none beside tokens", batch_size)
            require(packed, "packed", "True for a budget of tokens", packed)
            self.order = TokenBudgetSampler(encoded.lengths, tokens, **order)
        self.pad_to_multiple, self.packed, self.multiple = pad_to_multiple, packed, multiple
        together: Any = (
            partial(collate_packed, multiple=multiple)
            if packed
            else partial(collate, pad_to_multiple=pad_to_multiple)
        )
        super().__init__(
            encoded,
            batch_sampler=self.order,
            collate_fn=partial(together, pad_token_id=encoded.pad_token_id, per=encoded.per),
            generator=torch.Generator(),
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate."""
        self.order.set_epoch(epoch)

    def resume(self, *, epoch: int, start: int) -> None:
        """Iterate ``epoch`` from batch ``start``; every other epoch is whole."""
        self.order.resume(epoch=epoch, start=start)

    def geometry(self) -> Geometry:
        """Geometry of what iterating now would give, from the lengths alone."""
        lengths = self.order.lengths
        if self.packed:
            orders = list(self.order)
            return _packed_geometry((lengths[rows] for rows in orders), self.multiple)
        padded = round_up(lengths, self.pad_to_multiple)
        shapes = ((len(rows), int(padded[rows].max())) for rows in self.order)
        return Geometry(
            shapes=count_shapes(shapes),
            real_tokens=sum(int(lengths[rows].sum()) for rows in self.order),
        )


def geometry(batches: Iterable[Mapping[str, torch.Tensor]]) -> Geometry:
    """Geometry of any batches in HuggingFace's form; of ``Batches`` without building a tensor."""
    if isinstance(batches, Batches):
        return batches.geometry()
    shapes: list[tuple[int, int]] = []
    packed: list[tuple[npt.NDArray[np.int64], int]] = []
    real = 0
    for batch in batches:
        if "cu_seqlens" in batch:
            lengths = batch["cu_seqlens"].diff().cpu().numpy()
            packed.append((lengths, batch["input_ids"].numel()))
            continue
        rows, length = batch["input_ids"].shape
        shapes.append((rows, length))
        mask = batch.get("attention_mask")
        real += rows * length if mask is None else int(mask.sum())
    one_kind = bool(shapes) != bool(packed)
    require(one_kind, "batches", "at least one batch, all padded or all packed", "none or both")
    if packed:
        return Geometry.total([Geometry.of_packed(*one) for one in packed])
    return Geometry(shapes=count_shapes(shapes), real_tokens=real)


def _packed_geometry(batches: Iterable[npt.NDArray[np.int64]], multiple: int) -> Geometry:
    return Geometry.total(
        [Geometry.of_packed(lengths, round_up(int(lengths.sum()), multiple)) for lengths in batches]
    )
