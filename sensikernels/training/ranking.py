"""The batches and the loss that a ``transformers.Trainer``'s model is ranked by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from sensikernels._core.checks import require
from sensikernels._core.errors import UsageError
from sensikernels.hf import checked_loss, modes_kept, own_loss
from sensikernels.methods import Run
from sensikernels.world import World

BATCH = 32


class Ranking:
    """Some rows of a Trainer's training set, collated as it does; the same at every reading.

    Raises:
        UsageError: the loader is no ``DataLoader``; its dataset is a stream that can be read only
            once, or is read by several processes.
    """

    def __init__(self, loader: Any, *, rows: int, seed: int, world: World) -> None:
        known = isinstance(loader, DataLoader)
        require(known, "train_dataloader", "a torch DataLoader", type(loader).__name__)
        self.loader, self.rows, self.seed = loader, rows, seed
        self.sized = not isinstance(loader.dataset, IterableDataset)
        if self.sized:
            return
        alone = world.size == 1
        require(alone, "train_dataset", "one with a length for several processes", "a stream")
        stream = loader.dataset
        again = iter(stream) is not iter(stream)
        require(again, "train_dataset", "a stream that can be read twice", "an iterator")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches():
            yield {name: _as_tensor(value) for name, value in batch.items()}

    def _batches(self) -> Iterator[Mapping[str, Any]]:
        dataset, collate = self.loader.dataset, self.loader.collate_fn
        if self.sized:
            generator = torch.Generator().manual_seed(self.seed)
            chosen = torch.randperm(len(dataset), generator=generator)[: self.rows]
            subset = Subset(dataset, sorted(chosen.tolist()))
            yield from DataLoader(
                subset, batch_size=BATCH, collate_fn=collate, generator=torch.Generator()
            )
            return
        left = islice(iter(dataset), self.rows)
        while rows := list(islice(left, BATCH)):
            yield collate(rows)


def _as_tensor(value: Any) -> Any:
    """Numbers as tensors; one whole number, such as ``max_length``, and strings stay."""
    if isinstance(value, (Tensor, int, str)) or value is None:
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value


@torch.no_grad()
def try_loss(run: Run, ranking: Ranking) -> None:
    """Take the loss of one ranking batch, so that what cannot be ranked is found now.

    Raises:
        UsageError: there is no batch, or no loss of it.
    """
    batch = next(iter(ranking), None)
    if batch is None:
        raise UsageError("train_dataset: expected rows to rank by, got none")
    model = run.model
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), modes_kept(model):
        model.eval()
        try:
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            checked_loss(run.compute_loss or own_loss)(model, moved)
        except UsageError:
            raise
        except Exception as error:  # the model's, of whatever kind: told with what to do
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"batches: expected ones that the model takes with its loss, got {sorted(batch)}: "
                f"{first} (SensiCallback(compute_loss=…) takes any other loss)"
            ) from error
