"""Orders of rows: random, of similar length, resumable."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from sensikernels._core.checks import require

if TYPE_CHECKING:
    from typing_extensions import Unpack

Lengths = npt.NDArray[np.int64]


class Order(TypedDict, total=False):
    """The arguments of every sampler.

    ``seed`` (0) and ``epoch`` (0) make the order; ``start`` (0) is the first batch to iterate;
    ``bucket`` (32): batches that are sorted by length together; ``shuffle`` (True).
    """

    seed: int
    epoch: int
    start: int
    bucket: int
    shuffle: bool


class _Resumable(Sampler[list[int]]):
    """Batches of row indices in an order that is a function of ``seed`` and ``epoch`` alone.

    So a run that resumes at ``start`` batches into an epoch sees what the uninterrupted run saw.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike,
        *,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        bucket: int = 32,
        shuffle: bool = True,
    ) -> None:
        self.lengths: Lengths = np.asarray(lengths)
        require(
            self.lengths.ndim == 1 and self.lengths.size > 0,
            "lengths",
            "[rows], rows >= 1",
            f"shape {self.lengths.shape}",
        )
        require(bucket >= 1, "bucket", "at least 1 batch", bucket)
        require(seed >= 0, "seed", "at least 0", seed)
        self.drop_last = False
        self.seed, self.bucket, self.shuffle = seed, bucket, shuffle
        self.resume(epoch=epoch, start=start)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate; accelerate's loaders call this themselves."""
        require(epoch >= 0, "epoch", "at least 0", epoch)
        self.epoch = epoch

    def resume(self, *, epoch: int, start: int) -> None:
        """Iterate ``epoch`` from batch ``start``; every other epoch is whole."""
        self.set_epoch(epoch)
        batches = self._total()
        require(0 <= start <= batches, "start", f"a batch index in 0..{batches}", start)
        self._resumed = (epoch, start)

    def __len__(self) -> int:
        return self._total() - self._start()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches()[self._start() :])

    def _start(self) -> int:
        epoch, start = self._resumed
        return start if epoch == self.epoch else 0

    def _total(self) -> int:
        return len(self._batches())

    def _batches(self) -> list[list[int]]:
        if not self.shuffle:
            return self._cut(np.argsort(self.lengths, kind="stable"))
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        window = self._window()
        for i in range(0, len(order), window):
            part = order[i : i + window]
            order[i : i + window] = part[np.argsort(self.lengths[part], kind="stable")]
        batches = self._cut(order)
        return [batches[i] for i in rng.permutation(len(batches))]

    @abstractmethod
    def _window(self) -> int:
        """Rows that are sorted by length together: about ``bucket`` batches."""

    @abstractmethod
    def _cut(self, order: npt.NDArray[np.int64]) -> list[list[int]]:
        """Rows in order, as batches."""


class LengthBucketSampler(_Resumable):
    """Batches of row indices: random, yet each of rows of similar length.

    Rows are shuffled, cut into windows of ``bucket`` batches, sorted by length inside each
    window and cut into batches, which are then shuffled. ``shuffle=False`` sorts all rows by
    length, for evaluation. Every row occurs once an epoch; at most one batch is short.
    """

    def __init__(self, lengths: npt.ArrayLike, batch_size: int, **order: Unpack[Order]) -> None:
        require(batch_size >= 1, "batch_size", "at least 1", batch_size)
        self.batch_size = batch_size
        super().__init__(lengths, **order)

    def _total(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def _window(self) -> int:
        return self.batch_size * self.bucket

    def _cut(self, order: npt.NDArray[np.int64]) -> list[list[int]]:
        size = self.batch_size
        return [order[i : i + size].tolist() for i in range(0, len(order), size)]


class TokenBudgetSampler(_Resumable):
    """Batches of at most ``tokens`` tokens, for packed batches: as many rows as fit.

    Order as in ``LengthBucketSampler``: rows of one batch are of similar length, and every row
    occurs once an epoch. The number of batches may differ between epochs. ``shuffle=False`` sorts
    all rows by length.

    Raises:
        UsageError: a row is longer than ``tokens``.
    """

    def __init__(self, lengths: npt.ArrayLike, tokens: int, **order: Unpack[Order]) -> None:
        longest = int(np.max(np.asarray(lengths), initial=0))
        require(tokens >= max(longest, 1), "tokens", f"at least {longest}, the longest row", tokens)
        self.tokens = tokens
        self._made: tuple[int, list[list[int]]] | None = None
        super().__init__(lengths, **order)

    def _window(self) -> int:
        return max(1, round(self.tokens * self.bucket / float(self.lengths.mean())))

    def _batches(self) -> list[list[int]]:
        if self._made is None or self._made[0] != self.epoch:
            self._made = self.epoch, super()._batches()
        return self._made[1]

    def _cut(self, order: npt.NDArray[np.int64]) -> list[list[int]]:
        batches: list[list[int]] = []
        room = 0
        for row, length in zip(order.tolist(), self.lengths[order].tolist(), strict=True):
            if length > room or not batches:
                batches.append([])
                room = self.tokens
            batches[-1].append(row)
            room -= length
        return batches
