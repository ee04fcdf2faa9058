"""Tokenised rows: encoded once, kept end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from sensikernels._core.checks import require
from sensikernels.data.tsv import Examples

CHUNK = 4096  # rows per tokenizer call: its intermediate objects are far larger than the ids

Ids = npt.NDArray[np.int32]


Per = Literal["row", "token", "span"]
"""What a label belongs to: a row, a token (-100: to none), a row's first and last token."""
IGNORED = -100  # HuggingFace's losses skip it


class TokenRow(NamedTuple):
    """One tokenised row: ``input_ids`` and ``token_type_ids`` are ``[tokens]`` int32.

    ``label``: a number, or ``[names]``, ``[tokens]`` or (start, end) as ``Encoded.per`` says.
    """

    input_ids: Ids
    token_type_ids: Ids | None
    label: Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded(Dataset[TokenRow]):
    """Tokenised rows, end to end: row ``i`` is ``input_ids[offsets[i]:offsets[i + 1]]``.

    ``token_type_ids`` is None if the tokenizer gives none. ``labels`` is int64 or float32 per
    ``row``, ``[rows]`` or ``[rows, names]``; int64 ``[tokens]`` per ``token``, -100 where there is
    none; int64 ``[rows, 2]`` per ``span``. ``truth``: what a kind keeps to score the rows by, of as
    many rows; it has ``take``.
    """

    input_ids: Ids
    token_type_ids: Ids | None
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.generic]
    pad_token_id: int
    per: Per = "row"
    truth: Any = None

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """``[rows]``: tokens of each row, special tokens included."""
        return np.diff(self.offsets)

    @property
    def weights(self) -> npt.NDArray[np.int64] | None:
        """``[rows]``: terms of the mean loss in each row; None: one."""
        if self.per != "token":
            return None
        ends = np.concatenate([[0], np.cumsum(self.labels != IGNORED)])
        return np.diff(ends[self.offsets])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> TokenRow:
        at = slice(self.offsets[index], self.offsets[index + 1])
        types = None if self.token_type_ids is None else self.token_type_ids[at]
        label = self.labels[at if self.per == "token" else index]
        return TokenRow(self.input_ids[at], types, label)

    def take(self, rows: Any) -> Encoded:
        """Some rows, in the order given."""
        chosen = [self[int(i)] for i in rows]
        types = [p.token_type_ids for p in chosen if p.token_type_ids is not None]
        lengths = [len(p.input_ids) for p in chosen]
        by_token = self.per == "token"
        return Encoded(
            input_ids=np.concatenate([p.input_ids for p in chosen]),
            token_type_ids=np.concatenate(types) if types else None,
            offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            labels=np.concatenate([p.label for p in chosen]) if by_token else self.labels[rows],
            pad_token_id=self.pad_token_id,
            per=self.per,
            truth=None if self.truth is None else self.truth.take(rows),
        )


def labels_of(rows: Sequence[TokenRow], per: Per, tokens: Callable[[Any], Any]) -> dict[str, Any]:
    """The labels of a batch by their HuggingFace names; ``tokens`` arranges those of tokens."""
    labels = [row.label for row in rows]
    if per == "token":
        return {"labels": tokens(labels)}
    made = torch.from_numpy(np.asarray(labels))
    if per == "span":
        return {"start_positions": made[:, 0].clone(), "end_positions": made[:, 1].clone()}
    return {"labels": made}


def pad_of(tokenizer: Any) -> int:
    """The tokenizer's padding token. Raises UsageError if it has none."""
    pad = getattr(tokenizer, "pad_token_id", None)
    require(pad is not None, "tokenizer", "one with a pad_token_id", "none")
    return int(pad or 0)


def encode(examples: Examples, tokenizer: Callable[..., Any], *, max_length: int = 128) -> Encoded:
    """Tokenise every row once, cut to ``max_length`` tokens.

    ``tokenizer`` is called and read as a HuggingFace one is. Raises UsageError if it has no
    padding token or ``max_length`` is below 3.
    """
    require(max_length >= 3, "max_length", "at least 3", max_length)
    pad = pad_of(tokenizer)
    ids: list[Ids] = []
    types: list[Ids] = []
    lengths: list[int] = []
    for start in range(0, len(examples), CHUNK):
        part = slice(start, start + CHUNK)
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
        ids.append(flat(out["input_ids"]))
        if "token_type_ids" in out:
            types.append(flat(out["token_type_ids"]))
    return Encoded(
        input_ids=np.concatenate(ids),
        token_type_ids=np.concatenate(types) if types else None,
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        labels=examples.labels,
        pad_token_id=pad,
    )


def require_fast(tokenizer: Any, what: str) -> None:
    """Raise UsageError unless the tokenizer tells which characters a token is of."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    wanted = f"a fast tokenizer, as {what} are found by what its tokens cover"
    require(fast, "model", wanted, type(tokenizer).__name__)


def flat(rows: Iterable[Sequence[int]]) -> Ids:
    return np.fromiter(chain.from_iterable(rows), dtype=np.int32)
