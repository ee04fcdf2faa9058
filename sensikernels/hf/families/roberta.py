"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT's layers, with positions after the padding index."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.camembert import modeling_camembert
from transformers.models.roberta import modeling_roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta

from sensikernels.hf.families.bert import relative


def _logits(model: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = model.lm_head(hidden)
    return logits


def _positions(encoder: Any, ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The padding index plus how many words there are up to each one; padding has the index."""
    pad = encoder.config.pad_token_id
    words = ids.ne(pad).long()
    counted = words.cumsum(-1)
    if cu_seqlens is not None:
        flat = ids.flatten()
        row = torch.arange(len(flat), device=ids.device, dtype=torch.int32)
        sequence = torch.searchsorted(cu_seqlens[1:], row, right=True)
        before = F.pad(counted.flatten(), (1, 0))[cu_seqlens.long()]
        counted = counted - before[sequence].view_as(counted)
    return counted * words + pad


ROBERTA = relative(modeling_roberta, "Roberta", "RoBERTa", logits=_logits, positions=_positions)
XLM_ROBERTA = relative(
    modeling_xlm_roberta, "XLMRoberta", "XLM-RoBERTa", logits=_logits, positions=_positions
)
CAMEMBERT = relative(
    modeling_camembert, "Camembert", "CamemBERT", logits=_logits, positions=_positions
)
