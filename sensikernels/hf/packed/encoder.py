"""An encoder on packed tokens: unpadded once before the embeddings, no padding computed after.

Hidden states are ``[tokens, hidden]``; attention reads ``cu_seqlens``. The last layer of a
sequence classifier runs on first tokens alone, which changes nothing that its head reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from sensikernels._core.checks import require
from sensikernels.hf.family import Family, PackedStep, reach
from sensikernels.hf.module_state import Changed
from sensikernels.hf.packed.layer import embed, run_layer
from sensikernels.hf.packed.pieces import uncalled
from sensikernels.hf.packed.prefix_cache import FrozenPrefixCache
from sensikernels.hf.packed.tokens import Tokens, packed, unpadded

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
    """The family of a packed model, and the choices it was packed with.

    ``cls_only``: the last layer runs on first tokens alone. ``first_read``: the head reads first
    tokens alone. ``repad``: hidden states are ``[rows, length, hidden]`` for packed inputs too.
    """

    family: Family
    cls_only: bool
    fused: bool
    multiple: int
    repad: bool
    first_read: bool = False
    average: bool = False
    labelled_only: bool = False

    @property
    def step(self) -> PackedStep:
        """The family's classes and functions for packed tokens."""
        step = self.family.packed
        assert step is not None
        return step


class PackedEncoder(Changed):
    """A forward on packed tokens, put in front of an encoder's class by ``use_packed``.

    The instance, its submodules, Parameters and state dict stay what they were. Hooks on linears,
    norms and tables are honoured. Modules around them are not called: hooks there are refused.
    """

    packing: Packing
    prefix_cache: FrozenPrefixCache | None = None
    config: Any
    get_input_embeddings: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *others: Any,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_length: int | None = None,
        **named: Any,
    ) -> Any:
        """Run on HuggingFace's padded inputs ``[rows, length]``, or on packed ones.

        Packed: ``input_ids``, ``token_type_ids`` and ``position_ids`` are ``[1, tokens]``,
        ``cu_seqlens`` int32 ``[rows + 1]``, ``max_length`` a Python int at least as long as the
        longest sequence; nothing then waits for the device. ``others``: arguments of stock's
        forward, in its order.

        Returns:
            HuggingFace's output. ``last_hidden_state`` is ``[rows, 1, hidden]`` with ``cls_only``;
            else as the inputs: ``[rows, length, hidden]``, zero at padding, or
            ``[1, tokens, hidden]`` (for question answering ``[rows, max_length, hidden]``, for a
            head that averages tokens ``[rows, 1, hidden]``).

        Raises:
            UsageError: inputs that packed tokens have no use for, or that disagree.
        """
        if others:
            named |= dict(zip(_names_after_mask(self.original), others, strict=False))
            token_type_ids = named.pop("token_type_ids", token_type_ids)
            position_ids = named.pop("position_ids", position_ids)
        self._refuse(input_ids, named)
        assert input_ids is not None
        packing, pooler = self.packing, getattr(self, self.packing.family.pooler, None)
        if position_ids is None and packing.step.positions is not None:
            position_ids = packing.step.positions(self, input_ids, cu_seqlens)
        if cu_seqlens is None:
            tokens = unpadded(
                input_ids,
                attention_mask,
                token_type_ids,
                position_ids,
                multiple=packing.multiple,
                pooled=pooler is not None or packing.first_read,
                windowed=packing.step.windowed,
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
        layers, cache = self._stack(), self.prefix_cache
        if cache is None:
            hidden = self._lower(tokens, len(layers))
        else:
            prefix = [*below(self, self.packing.family), *layers[: cache.depth]]
            words = self.get_input_embeddings().weight
            hidden = cache(tokens, partial(self._lower, depth=cache.depth), prefix, words)
            hidden = self._layers(hidden, tokens, cache.depth, len(layers))
        closing = self.packing.step.closing
        out: Tensor = reach(self, closing)(hidden) if closing else hidden
        return out

    def _stack(self) -> Any:
        """The layers, whose holder is not called."""
        holder, _, leaf = self.packing.family.layers.rpartition(".")
        return getattr(uncalled(reach(self, holder)), leaf)

    def _lower(self, tokens: Tokens, depth: int) -> Tensor:
        """Embeddings and the lowest ``depth`` layers."""
        hidden = embed(self.packing.step.embedding(self), tokens, fused=self.packing.fused)
        return self._layers(hidden, tokens, 0, depth)

    def _layers(self, hidden: Tensor, tokens: Tokens, start: int, stop: int) -> Tensor:
        fused, layers, step = self.packing.fused, self._stack(), self.packing.step
        if step.rotations is not None:
            rotations = step.rotations(self, hidden, tokens.position_ids)
            tokens = replace(tokens, rotations=rotations)
        for layer in layers[start:stop]:
            first_only = self.packing.cls_only and layer is layers[-1]
            forward = getattr(layer, "packed_forward", None)
            forward = forward or partial(run_layer, step.block, uncalled(layer))
            run = partial(forward, tokens=tokens, fused=fused, first_only=first_only)
            if layer.gradient_checkpointing and layer.training:
                hidden = layer._gradient_checkpointing_func(run, hidden)
            else:
                hidden = run(hidden)
        return hidden

    def _arrange(self, hidden: Tensor, tokens: Tokens, *, padded: bool) -> Tensor:
        if self.packing.cls_only:
            return hidden[:, None]
        if self.packing.average and not padded:
            return tokens.averaged(hidden)[:, None]
        return tokens.padded(hidden) if padded or self.packing.repad else hidden[None]

    def _refuse(self, input_ids: Tensor | None, named: dict[str, Any]) -> None:
        require(input_ids is not None, "input_ids", "token ids", "none")
        for name in _REFUSED:
            value = named.get(name, getattr(self.config, name, None) if "output" in name else None)
            require(value is None or value is False, name, "none on packed tokens", "one")


@cache
def _names_after_mask(encoder: Any) -> tuple[str, ...]:
    """The names of the arguments of stock's forward after the attention mask."""
    names = tuple(signature(encoder.forward).parameters)
    return names[names.index("attention_mask") + 1 :]


def below(encoder: Any, family: Family) -> list[nn.Module]:
    """The modules of ``encoder`` under its layers."""
    found = (getattr(encoder, name, None) for name in family.below)
    return [module for module in found if module is not None]
