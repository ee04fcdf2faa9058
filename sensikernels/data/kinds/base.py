"""What a kind of task is: how its rows are read, encoded, labelled, scored and written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from sensikernels._core.checks import require
from sensikernels.data.rows import Encoded
from sensikernels.data.tasks import Split, Task

R = TypeVar("R", bound="Rows")
Order = npt.NDArray[np.int64]


class Rows(Protocol):
    """Rows of one split, as they were read."""

    def __len__(self) -> int: ...

    def take(self: R, rows: Order) -> R:
        """These rows, in this order."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Settled:
    """A task with all that is known once both splits are read; ``notes``: what was inferred."""

    task: Task
    train: Any
    dev: Any
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How rows are cut: ``max_length`` tokens; windows of long ones share ``doc_stride``."""

    max_length: int = 128
    doc_stride: int | None = None


class Kind(ABC):
    """One kind of task; its methods hold no state.

    ``suffixes`` of a file of predictions; ``cut``: the defaults of the two settings, where
    ``doc_stride`` None says that the kind has no windows.
    """

    suffixes: ClassVar[tuple[str, ...]]
    cut: ClassVar[Cut] = Cut()

    @abstractmethod
    def read(self, task: Task, data_dir: str | Path, split: Split) -> Rows:
        """The rows of a split below ``data_dir``. Raises DataError naming what is wrong where."""

    @abstractmethod
    def texts(self, rows: Any) -> list[tuple[str, ...]]:
        """What each row has us read, to tell which rows are alike."""

    @abstractmethod
    def settle(self, task: Task, train: Any, dev: Any) -> Settled:
        """The task's labels, from the training rows. Raises DataError: dev has others."""

    @abstractmethod
    def encode(self, task: Task, rows: Any, tokenizer: Any, cut: Cut, *, train: bool) -> Encoded:
        """Tokenised rows; for training those that teach something, else with their ``truth``."""

    @abstractmethod
    def score(self, task: Task, outputs: Any, truth: Any) -> dict[str, float]:
        """The task's metrics by name, the main one first.

        ``outputs``: logits ``[rows, labels]``, or ``[tokens, labels]`` of all rows' tokens end to
        end; ``truth``: labels, or ``Encoded.truth`` of the same rows. Raises UsageError for another
        shape, SensiError for logits that are not finite.
        """

    @abstractmethod
    def sample(self, task: Task) -> tuple[Any, Any]:
        """Outputs and truth of made-up rows, to see that ``score`` can be called."""

    @abstractmethod
    def predictions(self, task: Task, outputs: Any, truth: Any, order: Order, suffix: str) -> str:
        """The text of a file of predictions, its rows in file order.

        ``order[i]`` is the row that ``outputs`` and ``truth`` have at place i.
        """

    def check_file(self, task: Task, path: Path) -> None:
        """Raise UsageError unless ``path`` ends as a file of predictions does."""
        wanted = f"a file that ends in {' or '.join(self.suffixes)} for task {task.name}"
        require(path.suffix.lower() in self.suffixes, "predict", wanted, path)


def inverse(order: Order) -> Order:
    """The place of each row in ``order``."""
    return np.argsort(order)
