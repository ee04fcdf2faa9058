"""Training rows held out to choose settings by, and training rows that share no text with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sensikernels._core.checks import require
from sensikernels.data.kinds.base import Kind

SEED = 20_230_714
"""Of the draw of rows to score, whatever the run's own seed: every run is judged by the same."""
_SHORT = 4  # words; shorter texts are part of any other


def held_out(kind: Kind, rows: Any, count: int, wanted: int | None, seed: int) -> tuple[Any, Any]:
    """``wanted`` training rows (None: all) and ``count`` others that share no text with them.

    Two rows share a text if one's, of at least four words, is another's or a part of it, as
    SST-2's phrases are of its sentences. Held-out rows are the same for every ``seed``, which
    draws the training rows; both are in file order.

    Raises:
        UsageError: fewer rows than ``count`` and one more, or none is left to train on.
    """
    require(count < len(rows), "held_out", f"fewer than the {len(rows)} training rows", count)
    chosen = np.random.default_rng(SEED).permutation(len(rows))[:count]
    texts = kind.texts(rows)
    known = _Known([texts[row] for row in chosen])
    left = np.setdiff1d(np.arange(len(rows)), chosen)
    taken: list[int] = []
    for row in np.random.default_rng(seed).permutation(left):
        if wanted is not None and len(taken) == wanted:
            break
        if not known.share(texts[row]):
            taken.append(int(row))
    require(len(taken) > 0, "held_out", "rows that leave others to train on", count)
    return rows.take(np.sort(np.asarray(taken, np.int64))), rows.take(np.sort(chosen))


class _Known:
    """The texts of held-out rows, ready to be looked for."""

    def __init__(self, rows: Sequence[Sequence[str]]) -> None:
        self.whole = {_plain(text) for row in rows for text in row}
        self.long = [text for text in self.whole if _words(text) >= _SHORT]
        self.joined = "\n".join(self.whole)

    def share(self, row: Sequence[str]) -> bool:
        return any(self._shares(_plain(text)) for text in row)

    def _shares(self, text: str) -> bool:
        if _words(text) < _SHORT:
            return text in self.whole
        return text in self.joined or any(held in text for held in self.long)


def _plain(text: str) -> str:
    """Blanks around every word, so that parts end where words do."""
    return f" {' '.join(text.split())} "


def _words(text: str) -> int:
    return text.count(" ") - 1
