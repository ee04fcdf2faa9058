"""Tokenise once, batch by length, pad little, and let batch shapes repeat.

Padded lengths are multiples of ``pad_to_multiple``, so a run sees a handful of shapes: on a CPU
oneDNN compiles a product per shape, on a GPU a graph is captured per shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sensikernels._checks import require
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
    length = _round_up(max(len(row.input_ids) for row in rows), pad_to_multiple)
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


class LengthBucketSampler(Sampler[list[int]]):
    """Batches of row indices: random, yet each of rows of similar length.

    Rows are shuffled, cut into windows of ``bucket`` batches, sorted by length inside each
    window and cut into batches, which are then shuffled. The order is a function of ``seed`` and
    ``epoch`` alone, so a run that resumes at ``start`` batches into an epoch sees what the
    uninterrupted run saw. ``shuffle=False`` sorts all rows by length, for evaluation.
    Every row occurs once an epoch; at most one batch is short.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        bucket: int = 32,
        shuffle: bool = True,
    ) -> None:
        self.lengths = np.asarray(lengths)
        require(self.lengths.ndim == 1 and self.lengths.size > 0, "lengths", "[rows], rows >= 1",
                f"shape {self.lengths.shape}")  # fmt: skip
        require(batch_size >= 1, "batch_size", "at least 1", batch_size)
        require(bucket >= 1, "bucket", "at least 1 batch", bucket)
        require(seed >= 0, "seed", "at least 0", seed)
        self.batch_size = batch_size
        self.drop_last = False
        self.seed = seed
        self.bucket = bucket
        self.shuffle = shuffle
        self.resume(epoch=epoch, start=start)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate; accelerate's loaders call this themselves."""
        require(epoch >= 0, "epoch", "at least 0", epoch)
        self.epoch = epoch

    def resume(self, *, epoch: int, start: int) -> None:
        """Iterate ``epoch`` from batch ``start``; every other epoch is whole."""
        batches = self._total()
        require(0 <= start <= batches, "start", f"a batch index in 0..{batches}", start)
        self.set_epoch(epoch)
        self._resumed = (epoch, start)

    def __len__(self) -> int:
        return self._total() - self._start()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches()[self._start() :])

    def _total(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def _start(self) -> int:
        epoch, start = self._resumed
        return start if epoch == self.epoch else 0

    def _batches(self) -> list[list[int]]:
        size, rows = self.batch_size, len(self.lengths)
        if not self.shuffle:
            order = np.argsort(self.lengths, kind="stable")
            return [order[i : i + size].tolist() for i in range(0, rows, size)]
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(rows)
        window = size * self.bucket
        for i in range(0, rows, window):
            part = order[i : i + window]
            order[i : i + window] = part[np.argsort(self.lengths[part], kind="stable")]
        batches = [order[i : i + size].tolist() for i in range(0, rows, size)]
        return [batches[i] for i in rng.permutation(len(batches))]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a pass over some batches costs, as far as shapes tell.

    ``shapes`` counts batches by ``(rows, padded length)``. Linear FLOPs follow ``tokens`` = Σ B·S;
    attention's follow ``squared`` = Σ B·S², and are exact at ``mean_length`` = Σ B·S² / Σ B·S.
    """

    shapes: Mapping[tuple[int, int], int]
    real_tokens: int

    @property
    def batches(self) -> int:
        """Number of batches."""
        return sum(self.shapes.values())

    @property
    def rows(self) -> int:
        """Σ B."""
        return sum(rows * count for (rows, _), count in self.shapes.items())

    @property
    def tokens(self) -> int:
        """Σ B·S: tokens computed, padding included."""
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


class Batches(DataLoader[Any]):
    """A DataLoader over tokenised rows, ready for ``accelerate``'s ``prepare``.

    Iterating never touches the global random state: a DataLoader without a generator of its own
    draws from it, and a resumed run would then see other dropout masks.
    """

    def __init__(
        self,
        encoded: Encoded,
        *,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        bucket: int = 32,
        pad_to_multiple: int = 8,
    ) -> None:
        """Arguments as in ``LengthBucketSampler`` and ``collate``; UsageError as there."""
        require(pad_to_multiple >= 1, "pad_to_multiple", "at least 1", pad_to_multiple)
        self.order = LengthBucketSampler(
            encoded.lengths,
            batch_size,
            seed=seed,
            epoch=epoch,
            start=start,
            bucket=bucket,
            shuffle=shuffle,
        )
        self.pad_to_multiple = pad_to_multiple
        super().__init__(
            encoded,
            batch_sampler=self.order,
            collate_fn=partial(
                collate, pad_token_id=encoded.pad_token_id, pad_to_multiple=pad_to_multiple
            ),
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
        padded = _round_up(lengths, self.pad_to_multiple)
        shapes = ((len(rows), int(padded[rows].max())) for rows in self.order)
        return Geometry(
            shapes=_count(shapes), real_tokens=sum(int(lengths[rows].sum()) for rows in self.order)
        )


def geometry(batches: Iterable[Mapping[str, torch.Tensor]]) -> Geometry:
    """Geometry of any batches in HuggingFace's form; of ``Batches`` without building a tensor."""
    if isinstance(batches, Batches):
        return batches.geometry()
    shapes: list[tuple[int, int]] = []
    real = 0
    for batch in batches:
        rows, length = batch["input_ids"].shape
        shapes.append((rows, length))
        mask = batch.get("attention_mask")
        real += rows * length if mask is None else int(mask.sum())
    require(len(shapes) > 0, "batches", "at least one batch", "none")
    return Geometry(shapes=_count(shapes), real_tokens=real)


def _count(shapes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    return dict(sorted(Counter(shapes).items()))


def _round_up(value: Any, multiple: int) -> Any:
    return -(-value // multiple) * multiple
