"""A task's rows as batches, and what the run's batches cost as far as shapes tell."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sensikernels._core.errors import DataError
from sensikernels._core.shapes import token_multiple
from sensikernels.data import (
    Batches,
    Columns,
    Encoded,
    Places,
    Task,
    embedded_model_path,
    kind_of,
    load_splits,
)
from sensikernels.data.kinds import Cut, Kind
from sensikernels.hf import load_tokenizer, to_padded
from sensikernels.masks import Geometry
from sensikernels.training.config import Settings
from sensikernels.training.distributed import Share, of_a_step, shares, turns
from sensikernels.world import ALONE, World

EVAL_BATCH = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """Batches of one run; ``geometry`` covers all its epochs, of all processes together.

    ``task`` has the labels of the rows; ``notes``: lines that say what was inferred from them.
    """

    task: Task
    tokenizer: Any
    train: Batches
    dev: Batches
    ranking: Batches
    geometry: Geometry
    device: torch.device
    world: World = ALONE
    accumulate: int = 1
    notes: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        settings: Settings,
        device: torch.device,
        world: World = ALONE,
        given: Mapping[str, Any] | None = None,
    ) -> Data:
        """Read, tokenise and order everything the run will see; ``given``: its rows, in Python."""
        settled = load_splits(
            settings.task,
            _places(settings, given),
            max_train_samples=settings.max_train_samples,
            max_eval_samples=settings.max_eval_samples,
            held_out=settings.held_out,
            seed=settings.seed,
        )
        task = settled.task
        tokenizer = load_tokenizer(model_path(settings.model), words=task.kind == "tokens")
        train, dev = (
            kind_of(task).encode(task, rows, tokenizer, _cut(settings), train=rows is settled.train)
            for rows in (settled.train, settled.dev)
        )
        batches = _batches(train, settings, seed=settings.seed, packed_on=device.type)
        return cls(
            task=task,
            tokenizer=tokenizer,
            train=batches,
            dev=_batches(dev, settings, size=EVAL_BATCH),
            ranking=_ranking(train, settings),
            geometry=_all_epochs(batches, settings.epochs),
            device=device,
            world=world,
            accumulate=settings.gradient_accumulation_steps,
            notes=settled.notes,
        )

    @property
    def kind(self) -> Kind:
        """How the task's rows are scored and written."""
        return kind_of(self.task)

    @property
    def dev_order(self) -> np.ndarray[Any, Any]:
        """int64 ``[rows]``: the development rows in the order of their batches."""
        return np.concatenate([np.asarray(rows, np.int64) for rows in self.dev.order])

    def truth(self) -> Any:
        """What the development rows are scored by, in the order of their batches."""
        encoded: Any = self.dev.dataset
        return encoded.truth.take(self.dev_order)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; its last may have fewer batches."""
        self.train.resume(epoch=0, start=0)
        return -(-len(self.train.order) // self.accumulate)

    def padded(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The same rows as HuggingFace pads them; a padded batch as it is."""
        encoded: Any = self.train.dataset
        return to_padded(
            batch, pad_token_id=encoded.pad_token_id, multiple=self.train.pad_to_multiple
        )

    def shares(self, number: int, start: int = 0) -> Iterator[Share]:
        """This process's share of one epoch's training batches from ``start``, on the device."""
        self.train.resume(epoch=number, start=start)
        mine = shares(self.world, self.train)
        return (share._replace(batch=self._to_device(share.batch)) for share in mine)

    def steps(self, number: int, start: int = 0) -> Iterator[tuple[Share, ...]]:
        """The shares of one epoch from optimizer step ``start``, those of a step together."""
        shares = self.shares(number, start * self.accumulate)
        while parts := tuple(islice(shares, self.accumulate)):
            yield of_a_step(parts)

    def epoch(self, number: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches of ``shares``."""
        return (share.batch for share in self.shares(number, start))

    def ranked(self) -> Iterator[dict[str, Tensor]]:
        """The batches that rank units: the same ones at every call, shared among processes."""
        return self._moved(turns(self.world, self.ranking))

    def evaluated(self, world: World = ALONE) -> Iterator[dict[str, Tensor]]:
        """Development batches; with ``world`` this process's, as many as any other's."""
        return self._moved(turns(world, self.dev, even=True))

    def largest(self) -> dict[str, Tensor]:
        """The first epoch's training batch with the most computed tokens."""
        self.train.resume(epoch=0, start=0)
        lengths = self.train.order.lengths
        packed = self.train.packed

        def tokens(rows: list[int]) -> int:
            return int(lengths[rows].sum() if packed else len(rows) * lengths[rows].max())

        rows = max(self.train.order, key=tokens)
        collate: Any = self.train.collate_fn
        batch: dict[str, Tensor] = collate([self.train.dataset[i] for i in rows])
        return self._to_device(batch)

    def fingerprint(self) -> str:
        """A digest of the tokenised training rows and their order's parameters."""
        digest = hashlib.sha256()
        encoded: Any = self.train.dataset
        for array in (encoded.input_ids, encoded.offsets, encoded.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        if self.notes:  # of labels that the data name, their names
            digest.update("\n".join(self.task.label_names).encode())
        return digest.hexdigest()

    def _moved(self, batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        return (self._to_device(batch) for batch in batches)

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }


def model_path(name: str) -> Path | str:
    """``minilm`` is the embedded model; anything else is a folder or a hub name.

    Raises DataError for a path that is no model's folder.
    """
    if name == "minilm":
        return embedded_model_path()
    path = Path(name)
    if (path.is_absolute() or name.startswith(".")) and not (path / "config.json").is_file():
        what = "no config.json in this folder" if path.is_dir() else "no such folder"
        raise DataError(f"model {name}: {what}")
    return name


def _places(settings: Settings, given: Mapping[str, Any] | None) -> Places:
    columns = Columns(
        text=settings.text_column, pair=settings.pair_column, label=settings.label_column
    )
    return Places(
        data_dir=settings.data_dir,
        train_file=settings.train_file,
        dev_file=settings.dev_file,
        columns=columns,
        given=given,
    )


def _cut(settings: Settings) -> Cut:
    assert settings.max_length is not None
    return Cut(max_length=settings.max_length, doc_stride=settings.doc_stride)


def _batches(
    encoded: Encoded,
    settings: Settings,
    *,
    size: int | None = None,
    seed: int | None = None,
    packed_on: str = "",
) -> Batches:
    """``packed_on``: the type of device whose steps take them, where the settings pack tokens."""
    return Batches(
        encoded,
        batch_size=size or settings.batch_size,
        packed=settings.packed and packed_on != "",
        multiple=token_multiple(packed_on),
        shuffle=seed is not None,
        seed=seed or 0,
        pad_to_multiple=settings.pad_to_multiple,
    )


def _ranking(train: Encoded, settings: Settings) -> Batches:
    rows = np.random.default_rng(settings.seed).permutation(len(train))
    chosen = train.take(np.sort(rows[: settings.ranking_rows]))
    return _batches(chosen, settings, size=32, seed=settings.seed)


def _all_epochs(train: Batches, epochs: float) -> Geometry:
    passes = []
    for epoch in range(math.ceil(epochs)):
        train.resume(epoch=epoch, start=0)
        passes.append(train.geometry())
    return Geometry.total(passes)
