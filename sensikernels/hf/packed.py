"""BERT on packed tokens: unpadded once before the embeddings, no padding computed after.

Hidden states are ``[tokens, hidden]``; attention reads ``cu_seqlens``. The last layer of a
sequence classifier runs on first tokens alone, which changes nothing that its head reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertEncoder,
    BertIntermediate,
    BertLayer,
    BertOutput,
    BertSelfAttention,
    BertSelfOutput,
)

from sensikernels._core.checks import require
from sensikernels._core.errors import UsageError
from sensikernels._core.hooks import hooked
from sensikernels.hf.labelled import restore_labelled, use_labelled
from sensikernels.hf.modeling import TrimmedSelfAttention
from sensikernels.hf.module_state import Changed, change_back, change_class
from sensikernels.hf.packed_cache import FrozenPrefixCache, frozen_depth
from sensikernels.hf.packed_layer import embed, run_layer, uncalled
from sensikernels.hf.packed_tokens import MULTIPLE, Tokens, packed, unpadded

_REFUSED = (
    "inputs_embeds",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "past_key_values",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "cu_seq_lens_q",
)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a model was packed."""

    cls_only: bool
    fused: bool
    multiple: int
    repad: bool
    labelled_only: bool = False


class PackedBert(Changed):
    """A forward on packed tokens; what ``use_packed`` puts in front of a ``BertModel``'s class.

    The instance, its submodules, Parameters and state dict stay what they were. Hooks on linears,
    norms and tables are honoured. Modules around them are not called: hooks there are refused.
    """

    packing: Packing
    prefix_cache: FrozenPrefixCache | None = None
    embeddings: Any
    encoder: Any
    pooler: Any
    config: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_length: int | None = None,
        **named: Any,
    ) -> Any:
        """HuggingFace's padded inputs ``[rows, length]``, or packed ones.

        Packed: ``input_ids``, ``token_type_ids`` and ``position_ids`` are ``[1, tokens]``,
        ``cu_seqlens`` int32 ``[rows + 1]``, ``max_length`` a Python int at least as long as the
        longest sequence; nothing then waits for the device.

        Returns:
            HuggingFace's output. ``last_hidden_state`` is ``[rows, 1, hidden]`` with ``cls_only``;
            else as the inputs: ``[rows, length, hidden]``, zero at padding, or
            ``[1, tokens, hidden]`` (for question answering ``[rows, max_length, hidden]``).

        Raises:
            UsageError: inputs that packed tokens have no use for, or that disagree.
        """
        self._refuse(input_ids, named)
        assert input_ids is not None
        packing, pooler = self.packing, self.pooler
        if cu_seqlens is None:
            tokens = unpadded(
                input_ids,
                attention_mask,
                token_type_ids,
                position_ids,
                multiple=packing.multiple,
                pooled=pooler is not None,
            )
        else:
            require(attention_mask is None, "attention_mask", "none beside cu_seqlens", "one")
            tokens = packed(input_ids, cu_seqlens, max_length, token_type_ids, position_ids)
        hidden = self._encode(tokens)
        first = hidden if packing.cls_only else None
        if first is None and pooler is not None:
            first = hidden.index_select(0, tokens.first)
        out = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=self._arrange(hidden, tokens, padded=cu_seqlens is None),
            pooler_output=None if pooler is None or first is None else pooler(first[:, None]),
        )
        return out if named.get("return_dict", True) is not False else out.to_tuple()

    def _encode(self, tokens: Tokens) -> Tensor:
        depth, cache = len(uncalled(self.encoder).layer), self.prefix_cache
        if cache is None:
            return self._lower(tokens, depth)
        prefix = [self.embeddings, *self.encoder.layer[: cache.depth]]
        hidden = cache(tokens, partial(self._lower, depth=cache.depth), prefix)
        return self._layers(hidden, tokens, cache.depth, depth)

    def _lower(self, tokens: Tokens, depth: int) -> Tensor:
        """Embeddings and the lowest ``depth`` layers."""
        hidden = embed(uncalled(self.embeddings), tokens, fused=self.packing.fused)
        return self._layers(hidden, tokens, 0, depth)

    def _layers(self, hidden: Tensor, tokens: Tokens, start: int, stop: int) -> Tensor:
        fused, layers = self.packing.fused, self.encoder.layer
        for layer in layers[start:stop]:
            first_only = self.packing.cls_only and layer is layers[-1]
            forward = getattr(layer, "compact_forward", None) or partial(run_layer, uncalled(layer))
            run = partial(forward, tokens=tokens, fused=fused, first_only=first_only)
            if layer.gradient_checkpointing and layer.training:
                hidden = layer._gradient_checkpointing_func(run, hidden)
            else:
                hidden = run(hidden)
        return hidden

    def _arrange(self, hidden: Tensor, tokens: Tokens, *, padded: bool) -> Tensor:
        if self.packing.cls_only:
            return hidden[:, None]
        return tokens.padded(hidden) if padded or self.packing.repad else hidden[None]

    def _refuse(self, input_ids: Tensor | None, named: dict[str, Any]) -> None:
        require(input_ids is not None, "input_ids", "token ids", "none")
        for name in _REFUSED:
            value = named.get(name, getattr(self.config, name, None) if "output" in name else None)
            require(value is None or value is False, name, "none on packed tokens", "one")


def use_packed(
    model: nn.Module,
    *,
    cls_only: bool = True,
    fused: bool = True,
    multiple: int = MULTIPLE,
    labelled_only: bool = False,
) -> tuple[str, ...]:
    """Run ``model``'s BERT on packed tokens, in place; one line per change.

    The model takes its padded inputs as before, and packed ones (``PackedBert.forward``).

    ``cls_only``: a sequence classifier's last layer runs on first tokens alone (other heads read
    every token and are not changed). ``fused``: one product for query, key and value where that
    gains, and one pass each for embeddings, bias and GELU, dropout, residual and LayerNorm;
    their dropout is counter dropout. Without it the modules are called one by one. Attention's
    dropout is always from a counter. ``multiple``: padded inputs give token counts rounded up to
    multiples of it.
    ``labelled_only``: in training a masked-language model's head and loss run on labelled tokens
    alone. Loss and gradients stay; ``logits`` become ``[labelled, vocabulary]``, so it is off
    unless asked for.

    A padded question-answering batch has hidden states 0 at padding, where HuggingFace's has
    those of padding tokens; its loss is the same where no row is padded.

    Raises:
        UsageError: packed already, no BERT encoder, a decoder, relative positions, an
            attention that is not known, or ``labelled_only`` without ``BertForMaskedLM``.
    """
    bert = _packable(model)
    require(multiple >= 1, "multiple", "at least 1", multiple)
    if labelled_only and not isinstance(model, BertForMaskedLM):
        require(False, "labelled_only", "a BertForMaskedLM", type(model).__name__)
    cls_only = cls_only and isinstance(model, BertForSequenceClassification)
    packing = Packing(
        cls_only=cls_only,
        fused=fused,
        multiple=multiple,
        repad=isinstance(model, BertForQuestionAnswering),
        labelled_only=labelled_only,
    )
    change_class(bert, PackedBert)
    bert.packing = packing
    if isinstance(model, BertForMaskedLM) and labelled_only:
        use_labelled(model, multiple)
    report = ["tokens packed"]
    report += ["fused passes"] if fused else []
    report += ["last layer on first tokens"] if cls_only else []
    report += ["language head on labelled tokens, in training"] if labelled_only else []
    return tuple(report)


def restore_packed(model: nn.Module) -> None:
    """Undo ``use_packed``. Raises UsageError if it is not in use."""
    bert = _bert(model)
    if not isinstance(bert, PackedBert):
        raise UsageError("model: expected packed tokens, got padded ones")
    restore_labelled(model)
    change_back(bert)
    del bert.packing
    bert.__dict__.pop("prefix_cache", None)


def cache_frozen_prefix(model: nn.Module, *, limit_mib: float = 1024.0) -> FrozenPrefixCache:
    """Compute the layers below the lowest trained one once for each sentence, and keep the result.

    For a packed model of which the embeddings and at least the lowest layer are frozen, with
    dropout off in them (``p = 0``; it is a change of the model that the caller makes). Undone by
    ``restore_packed``. ``limit_mib``: memory that the kept states may take.

    Raises:
        UsageError: the model is not packed or nothing lowest is frozen; at a step, that something
            below trains or drops out after all.
    """
    bert = _bert(model)
    require(isinstance(bert, PackedBert), "model", "packed tokens (use_packed)", "padded ones")
    layers = list(bert.encoder.layer)
    depth = min(frozen_depth(bert.embeddings, layers), len(layers) - 1)
    require(depth > 0, "model", "frozen embeddings and a frozen lowest layer", "trained ones")
    bert.prefix_cache = FrozenPrefixCache(depth, limit_mib=limit_mib)
    return bert.prefix_cache


def packing_of(model: nn.Module) -> Packing | None:
    """How ``model`` is packed, None if it is not."""
    bert = getattr(model, "bert", model)
    return bert.packing if isinstance(bert, PackedBert) else None


def computed(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """``batch`` as ``model`` computes it: a packed model's padded inputs without their padding."""
    packing = packing_of(model)
    if packing is None or "cu_seqlens" in batch:
        return batch
    tokens = unpadded(
        batch["input_ids"],
        batch.get("attention_mask"),
        None,
        None,
        multiple=packing.multiple,
        pooled=False,
    )
    return {"input_ids": tokens.input_ids[None], "cu_seqlens": tokens.cu_seqlens}


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """HuggingFace's own forward inside the block, whether packed or not."""
    bert: Any = getattr(model, "bert", model)
    if not isinstance(bert, PackedBert):
        yield
        return
    change_back(bert)
    try:
        yield
    finally:
        change_class(bert, PackedBert)


def _bert(model: nn.Module) -> Any:
    bert = getattr(model, "bert", model)
    require(isinstance(bert, BertModel), "model", "a BERT", type(model).__name__)
    return bert


def _packable(model: nn.Module) -> Any:
    """The BERT in ``model``. Raises UsageError unless its forward can be done on packed tokens."""
    bert = _bert(model)
    require(not isinstance(bert, PackedBert), "model", "padded tokens", "packed ones already")
    config: Any = bert.config
    decodes = config.is_decoder or config.add_cross_attention
    require(not decodes, "model", "an encoder", "a decoder")
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    require(positions == "absolute", "model", "absolute positions", positions)
    own = type(bert).forward is BertModel.forward
    require(own, "model", "BertModel's own forward", f"that of {type(bert).__name__}")
    for name, module in bert.named_modules():
        counts = isinstance(module, nn.Embedding) and module.scale_grad_by_freq
        require(
            not counts,
            f"model: {name}",
            "no scale_grad_by_freq, as the tokens that fill up count too",
            "it",
        )
        kinds = _AROUND.get(re.sub(r"\d+", "N", name))
        if kinds is not None:
            require(
                type(module) in kinds,
                f"model: {name}",
                "HuggingFace's " + kinds[0].__name__,
                type(module).__name__,
            )
            require(
                not hooked(module),
                f"model: {name}",
                "no hooks, as packed tokens do not call it",
                "hooks",
            )
    return bert


# Modules that are not called, by name.
_AROUND: dict[str, tuple[type, ...]] = {
    "embeddings": (BertEmbeddings,),
    "encoder": (BertEncoder,),
    "encoder.layer.N": (BertLayer,),
    "encoder.layer.N.attention": (BertAttention,),
    "encoder.layer.N.attention.self": (BertSelfAttention, TrimmedSelfAttention),
    "encoder.layer.N.attention.output": (BertSelfOutput,),
    "encoder.layer.N.intermediate": (BertIntermediate,),
    "encoder.layer.N.output": (BertOutput,),
}
