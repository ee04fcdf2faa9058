"""A question-answering model whose answers lie at tokens: padding has no part in their softmax."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import QuestionAnsweringModelOutput
from transformers.utils import can_return_tuple

from sensikernels.hf.module_state import ChangedHead


class AnswerHead(ChangedHead):
    """The mixin that ``use_packed`` puts in front of a question-answering model's class."""

    @can_return_tuple
    def forward(self: Any, *given: Any, **named: Any) -> Any:
        """HuggingFace's forward with the lowest finite logits at padding, of which it has none.

        HuggingFace's softmax counts the padding of a batch, so its loss depends on the longest
        row. This one is a row's own; where no row is padded the two are the same. The loss is
        float32 or wider, and positions that are no token of their row are not counted.
        """
        named = self.by_name(given, named)
        starts, ends = (named.pop(name, None) for name in ("start_positions", "end_positions"))
        out = self.original.forward(self, **named, return_dict=True)
        there = _tokens(named, out.start_logits)
        lowest = torch.finfo(out.start_logits.dtype).min
        start_logits = out.start_logits.masked_fill(~there, lowest)
        end_logits = out.end_logits.masked_fill(~there, lowest)
        loss = None
        if starts is not None and ends is not None:
            loss = (_loss(start_logits, starts, there) + _loss(end_logits, ends, there)) / 2
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits
        )


def _tokens(named: dict[str, Any], logits: Tensor) -> Tensor:
    """Bool ``[rows, length]``: where a batch has tokens."""
    if named.get("cu_seqlens") is not None:
        lengths = named["cu_seqlens"].diff()
        return torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]
    mask = named.get("attention_mask")
    return torch.ones_like(logits, dtype=torch.bool) if mask is None else mask != 0


def _loss(logits: Tensor, positions: Tensor, there: Tensor) -> Tensor:
    """Mean cross-entropy over rows whose position is a token; one below 0 is the first token."""
    positions = positions.reshape(-1, 1).clamp(0, logits.shape[1])
    counted = F.pad(there, (0, 1)).gather(1, positions)
    labels = positions.masked_fill(~counted, -100).squeeze(1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels)
