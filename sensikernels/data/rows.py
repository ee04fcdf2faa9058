"""Tokenised rows: encoded once, kept end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from sensikernels._core.checks import require
from sensikernels.data.tsv import Examples

_CHUNK = 4096  # rows per tokenizer call: its intermediate objects are far larger than the ids

Ids = npt.NDArray[np.int32]


class TokenRow(NamedTuple):
    """One tokenised row: ``input_ids`` and ``token_type_ids`` are ``[tokens]`` int32."""

    input_ids: Ids
    token_type_ids: Ids | None
    label: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded(Dataset[TokenRow]):
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

    def __getitem__(self, index: int) -> TokenRow:
        at = slice(self.offsets[index], self.offsets[index + 1])
        types = None if self.token_type_ids is None else self.token_type_ids[at]
        return TokenRow(self.input_ids[at], types, self.labels[index])


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
