"""Rows end to end in one batch, without padding between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sensikernels._core.checks import require
from sensikernels._core.shapes import MULTIPLE
from sensikernels.data.rows import IGNORED, Per, TokenRow, labels_of

LENGTHS = 16
"""``max_length`` is rounded up to multiples of this: a CUDA graph is captured for each."""

_LABELS = {"label": "labels", "label_ids": "labels"}


def collate_packed(
    rows: Sequence[TokenRow], *, pad_token_id: int, multiple: int = MULTIPLE, per: Per = "row"
) -> dict[str, Any]:
    """One packed batch, as ``use_packed`` models take it.

    ``input_ids`` and ``token_type_ids`` (if the tokenizer gives them): int64 ``[1, tokens]``,
    rounded up to ``multiple``; row ``i`` is ``cu_seqlens[i]`` up to ``cu_seqlens[i + 1]`` (int32
    ``[rows + 1]``), ``max_length`` a Python int not below the longest row's length. What follows
    the last row belongs to none. ``labels`` as in ``batching.collate``; ``per`` token they are
    ``[1, tokens]``, -100 after the last row. Positions are the encoder's to count: families begin
    at different ones.
    """
    batch = _together([row.input_ids for row in rows], pad_token_id, multiple)
    if rows[0].token_type_ids is not None:
        types = [row.token_type_ids for row in rows]
        batch["token_type_ids"] = _line(types, batch["input_ids"].numel(), 0)
    count = batch["input_ids"].numel()
    labels = labels_of(rows, per, lambda given: _line(given, count, IGNORED))
    return {**labels, **batch, "max_length": round_up(batch["max_length"], LENGTHS)}


@dataclass(kw_only=True)
class DataCollatorPacked:
    """``data_collator`` for ``transformers.Trainer`` with a model that ``use_packed`` has changed.

    Takes tokenised features (``input_ids``, perhaps ``token_type_ids``, ``attention_mask`` and
    labels of any kind) and packs them as ``collate_packed`` does; masked tokens are dropped.
    Labels of tokens become ``[1, tokens]`` with -100 after the last row, others ``[rows]``.
    Keep ``remove_unused_columns``' default: other columns raise UsageError.
    """

    pad_token_id: int = 0
    multiple: int = MULTIPLE

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch of the features."""
        kept = [_kept(feature) for feature in features]
        ids = [_at(f["input_ids"], keep) for f, keep in zip(features, kept, strict=True)]
        batch = _together(ids, self.pad_token_id, self.multiple)
        tokens = batch["input_ids"].numel()
        labels: dict[str, Any] = {}
        for given in features[0]:
            name = _LABELS.get(given, given)
            if name in ("input_ids", "attention_mask", "position_ids", "length"):
                continue
            values = [feature[given] for feature in features]
            if np.ndim(values[0]) == 0:
                labels[name] = torch.as_tensor(np.asarray(values))
                continue
            known = name in ("token_type_ids", "labels")
            require(known, "features", "tokens, token types and labels", repr(given))
            filler = IGNORED if name == "labels" else 0
            at = [_at(v, keep) for v, keep in zip(values, kept, strict=True)]
            (labels if name == "labels" else batch)[name] = _line(at, tokens, filler)
        # Labels come first: accelerate takes the first tensor's length for the number of rows.
        return {**labels, **batch}


def _together(ids: Sequence[npt.ArrayLike], pad: int, multiple: int) -> dict[str, Any]:
    lengths = np.asarray([np.size(row) for row in ids])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    tokens = round_up(int(ends[-1]), multiple)
    return {
        "input_ids": _line(ids, tokens, pad),
        "cu_seqlens": torch.from_numpy(ends.astype(np.int32)),
        "max_length": int(lengths.max()),
    }


def _line(rows: Sequence[Any], tokens: int, filler: int) -> torch.Tensor:
    """``[1, tokens]`` int64: the rows one after the other, then ``filler``."""
    flat = np.full(tokens, filler, np.int64)
    values = np.concatenate(rows)
    flat[: len(values)] = values
    return torch.from_numpy(flat)[None]


def _kept(feature: Mapping[str, Any]) -> npt.NDArray[np.bool_] | None:
    mask = feature.get("attention_mask")
    return None if mask is None else np.asarray(mask) != 0


def _at(values: npt.ArrayLike, keep: npt.NDArray[np.bool_] | None) -> npt.NDArray[Any]:
    array = np.asarray(values)
    return array if keep is None else array[keep]


def round_up(value: Any, multiple: int) -> Any:
    """The least multiple that is not below ``value``."""
    return -(-value // multiple) * multiple
