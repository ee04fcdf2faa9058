"""A masked-language model whose head runs on labelled tokens alone: its loss reads no others."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import can_return_tuple

from sensikernels.hf.family import Family
from sensikernels.hf.module_state import ChangedHead, change_back, change_class
from sensikernels.ops.cross_entropy import cross_entropy

IGNORED = -100  # HuggingFace's label of tokens that do not count


class LabelledHead(ChangedHead):
    """The mixin that ``use_labelled`` puts in front of a masked-language model's class."""

    labelled_head: tuple[Family, int]

    @can_return_tuple
    def forward(self: Any, *given: Any, **named: Any) -> Any:
        """HuggingFace's forward, but in training with ``labels``: head and loss on labelled tokens.

        Loss and gradients are those of all tokens; ``logits`` are then ``[labelled, vocabulary]``,
        in the order of the tokens, and the loss is float32.
        """
        family, multiple = self.labelled_head
        inputs = self.by_name(given, named)
        labels = inputs.pop("labels", None)
        if labels is None or not self.training:
            return self.original.forward(self, **inputs, labels=labels, return_dict=True)
        encoder = getattr(self, family.encoder)
        hidden = encoder(**inputs, return_dict=True).last_hidden_state.flatten(0, 1)
        labels = labels.flatten()
        places = (labels != IGNORED).nonzero().flatten()
        count = len(places)
        # Shapes repeat: the rest are first tokens that do not count.
        extra = -count % multiple
        hidden = hidden.index_select(0, F.pad(places, (0, extra)))
        logits = family.packed.language.logits(self, hidden)
        loss = cross_entropy(logits, F.pad(labels[places], (0, extra), value=IGNORED))
        return MaskedLMOutput(loss=loss, logits=logits[:count])


def use_labelled(model: nn.Module, family: Family, multiple: int) -> None:
    """Train ``model``'s head on labelled tokens; their number is rounded up to ``multiple``."""
    change_class(model, LabelledHead)
    object.__setattr__(model, "labelled_head", (family, multiple))


def restore_labelled(model: nn.Module) -> None:
    """Undo ``use_labelled``, where it is in use."""
    if isinstance(model, LabelledHead):
        change_back(model)
        object.__delattr__(model, "labelled_head")
