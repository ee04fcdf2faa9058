"""Tokenise once, batch by length, pad little or not at all, and let batch shapes repeat.

Padded lengths are multiples of ``pad_to_multiple``, packed token counts of ``multiple``, so a run
sees a handful of shapes: on a CPU oneDNN compiles a product per shape, on a GPU a graph is
captured per shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from sensikernels._checks import require
from sensikernels.glue.packing import MULTIPLE, collate_packed, round_up
from sensikernels.glue.sampling import LengthBucketSampler, TokenBudgetSampler
from sensikernels.glue.tsv import Examples

_CHUNK = 4096  # rows per tokenizer call: its intermediate objects are far larger than the ids

Ids = npt.NDArray[np.int32]


class Row(NamedTuple):
    """One tokenised row: ``input_ids`` and ``token_type_ids`` are ``[tokens]`` int32."""

    input_ids: Ids
    token_type_ids: Ids | None
    label: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded(Dataset[Row]):
    """Tokenised rows, end to end: row ``i`` is ``input_ids[offsets[i]:offsets[i + 1]]``.

    ``token_type_ids`` is None if the tokenizer gives none. ``labels`` is int64 or float32.
    """

    input_ids: Ids
    token_type_ids: Ids | None
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.generic]
    pad_token_id: int

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """``[rows]``: tokens of each row, special tokens included."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Row:
        at = slice(self.offsets[index], self.offsets[index + 1])
        types = None if self.token_type_ids is None else self.token_type_ids[at]
        return Row(self.input_ids[at], types, self.labels[index])


def encode(examples: Examples, tokenizer: Callable[..., Any], *, max_length: int = 128) -> Encoded:
    """Tokenise every row once, cut to ``max_length`` tokens.

    ``tokenizer`` is called and read as a HuggingFace one is. Raises UsageError if it has no
    padding token or ``max_length`` is below 3.
    """
    require(max_length >= 3, "max_length", "at least 3", max_length)
    pad = getattr(tokenizer, "pad_token_id", None)
    require(pad is not None, "tokenizer", "one with a pad_token_id", "none")
    ids: list[Ids] = []
    types: list[Ids] = []
    lengths: list[int] = []
    for start in range(0, len(examples), _CHUNK):
        part = slice(start, start + _CHUNK)
        pair = () if examples.texts_b is None else (list(examples.texts_b[part]),)
        out = tokenizer(
            list(examples.texts_a[part]),
            *pair,
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
        )
        lengths += [len(row) for row in out["input_ids"]]
        ids.append(_flat(out["input_ids"]))
        if "token_type_ids" in out:
            types.append(_flat(out["token_type_ids"]))
    return Encoded(
        input_ids=np.concatenate(ids),
        token_type_ids=np.concatenate(types) if types else None,
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        labels=examples.labels,
        pad_token_id=int(pad or 0),
    )


def _flat(rows: Iterable[Sequence[int]]) -> Ids:
    return np.fromiter(chain.from_iterable(rows), dtype=np.int32)


def collate(
    rows: Sequence[Row], *, pad_token_id: int, pad_to_multiple: int = 8
) -> dict[str, torch.Tensor]:
    """One batch, padded to its longest row rounded up to ``pad_to_multiple``.

    ``input_ids``, ``token_type_ids`` (if the tokenizer gives them) and ``attention_mask`` are
    int64 ``[rows, length]``; ``labels`` is ``[rows]``, int64 classes or float32 scores.
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
    batch["labels"] = torch.from_numpy(np.asarray([row.label for row in rows]))
    return batch


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a pass over some batches costs, as far as shapes tell.

    ``shapes`` counts batches by ``(rows, padded length)``. Linear FLOPs follow ``tokens`` = Σ B·S;
    attention's follow ``squared`` = Σ B·S², and are exact at ``mean_length`` = Σ B·S² / Σ B·S.

    Packed batches: ``packed`` counts them by tokens, rounding included, and ``shapes`` counts
    their sequences as ``(1, length)``; the same formulas hold.
    """

    shapes: Mapping[tuple[int, int], int]
    real_tokens: int
    packed: Mapping[int, int] | None = None

    @classmethod
    def total(cls, parts: Sequence[Geometry]) -> Geometry:
        """That of several passes together, all padded or all packed."""
        shapes: Counter[tuple[int, int]] = Counter()
        packed: Counter[int] = Counter()
        for part in parts:
            shapes.update(part.shapes)
            packed.update(part.packed or {})
        return cls(
            shapes=dict(sorted(shapes.items())),
            real_tokens=sum(part.real_tokens for part in parts),
            packed=dict(sorted(packed.items())) or None,
        )

    @property
    def batches(self) -> int:
        """Number of batches."""
        return sum((self.shapes if self.packed is None else self.packed).values())

    @property
    def rows(self) -> int:
        """Σ B."""
        return sum(rows * count for (rows, _), count in self.shapes.items())

    @property
    def tokens(self) -> int:
        """Σ B·S: tokens computed, padding included."""
        if self.packed is not None:
            return sum(tokens * count for tokens, count in self.packed.items())
        return sum(rows * length * count for (rows, length), count in self.shapes.items())

    @property
    def squared(self) -> int:
        """Σ B·S²."""
        return sum(rows * length**2 * count for (rows, length), count in self.shapes.items())

    @property
    def mean_length(self) -> float:
        """Σ B·S² / Σ B·S, the sequence length to put into a per-token FLOP formula."""
        return self.squared / self.tokens

    @property
    def padding(self) -> float:
        """Share of computed tokens that are padding, 0..1."""
        return 1 - self.real_tokens / self.tokens

    @property
    def attended(self) -> float:
        """Share of computed tokens that are keys of attention: all but what packing rounds up."""
        return 1.0 if self.packed is None else self.real_tokens / self.tokens


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
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        bucket: int = 32,
        pad_to_multiple: int = 8,
        multiple: int = MULTIPLE,
    ) -> None:
        """Batches of ``batch_size`` rows or, packed, of at most ``tokens`` tokens.

        ``packed``: collated by ``collate_packed`` to a ``multiple`` of tokens, else by ``collate``.
        Other arguments as in the samplers. UsageError as there, and unless exactly one of
        ``batch_size`` and ``tokens`` is given.
        """
        require(pad_to_multiple >= 1, "pad_to_multiple", "at least 1", pad_to_multiple)
        require(multiple >= 1, "multiple", "at least 1", multiple)
        order: dict[str, Any] = dict(
            seed=seed, epoch=epoch, start=start, bucket=bucket, shuffle=shuffle
        )
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
            collate_fn=partial(together, pad_token_id=encoded.pad_token_id),
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
            shapes=_count(shapes), real_tokens=sum(int(lengths[rows].sum()) for rows in self.order)
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
        return Geometry.total([_one_packed(*one) for one in packed])
    return Geometry(shapes=_count(shapes), real_tokens=real)


def _packed_geometry(batches: Iterable[npt.NDArray[np.int64]], multiple: int) -> Geometry:
    return Geometry.total(
        [_one_packed(lengths, round_up(int(lengths.sum()), multiple)) for lengths in batches]
    )


def _one_packed(lengths: npt.NDArray[np.int64], tokens: int) -> Geometry:
    shapes = _count((1, int(length)) for length in lengths)
    return Geometry(shapes=shapes, real_tokens=int(lengths.sum()), packed={tokens: 1})


def _count(shapes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    return dict(sorted(Counter(shapes).items()))
