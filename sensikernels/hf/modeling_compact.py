"""Encoders with per-layer widths: the classes that ``compact`` makes and ``from_pretrained`` loads.

This file is saved with every compact checkpoint and imports nothing of this package, so that
``from_pretrained(..., trust_remote_code=True)`` works where this package is not installed. Its
classes are made of transformers' own: ``SkBertModel`` of ``BertModel``, when first asked for.

``widths`` in a config: per layer ``heads, qk_head_size, vo_head_size, neurons``, and which heads
are left (``kept_heads``) where each has a bias of its own. ``parts``: where the parts of that kind
of encoder are, and what the rows and columns of its linears are, query before key before value.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HEADS = (
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForMaskedLM",
    "ForPreTraining",
)
"""How the names of transformers' model classes end, after that of the kind of encoder."""

PARTS: dict[str, Mapping[str, Any]] = {}
"""By ``model_type``: the parts of a config that has none of its own."""


def register(config: Any, parts: Mapping[str, Any] | None = None) -> None:
    """Make the Auto classes know the compact classes of a stock ``config`` class."""
    compact = compact_class(config)
    if parts is not None:
        PARTS[compact.model_type] = parts
    AutoConfig.register(compact.model_type, compact, exist_ok=True)
    compact.register_for_auto_class()
    for head, stock in stock_models(config).items():
        auto = getattr(transformers, "AutoModel" if head == "Model" else f"AutoModel{head}")
        model = compact_class(stock)
        auto.register(compact, model, exist_ok=True)
        model.register_for_auto_class(auto.__name__)


def stock_models(config: type) -> dict[str, type]:
    """transformers' model classes of a stock ``config`` class, by one of ``HEADS``."""
    kind = config.__name__.removesuffix("Config")
    named = {head: getattr(transformers, kind + head, None) for head in HEADS}
    return {head: model for head, model in named.items() if model is not None}


@functools.cache
def compact_class(stock: Any) -> Any:
    """The class with per-layer widths of a stock config or model class."""
    if issubclass(stock, PretrainedConfig):

        def configure(self: Any, widths: Any = None, parts: Any = None, **named: Any) -> None:
            # Keys are layer numbers as strings, since JSON has no other.
            self.widths = {layer: dict(width) for layer, width in (widths or {}).items()}
            self.parts = dict(parts or {})
            stock.__init__(self, **named)

        own = {"__init__": configure, "model_type": f"sk_{stock.model_type}"}
        return _made(f"Sk{stock.__name__}", (stock,), own)

    def build(self: Any, config: Any, **named: Any) -> None:
        stock.__init__(self, config, **named)
        _resize(self, config)
        self.post_init()

    own = {"__init__": build, "config_class": compact_class(stock.config_class)}
    return _made(f"Sk{stock.__name__}", (stock,), own)


class TrimmedAttention(nn.Module):
    """HuggingFace's self-attention with ``qk_head_size`` and ``vo_head_size`` of their own.

    The scaling stays that of the untrimmed head, so that zeroed and removed dimensions agree.
    """

    stock_class: type
    projections: tuple[str, str, str]
    closing: str | None
    qk_head_size: int
    vo_head_size: int
    config: Any
    scaling: float
    dropout: nn.Dropout

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``[batch, sequence, hidden]`` to ``[batch, sequence, heads · vo_head_size]``.

        To ``[batch, sequence, hidden]`` where the output projection is inside, as stock has it.
        """
        lead = hidden_states.shape[:-1]
        sizes = (self.qk_head_size, self.qk_head_size, self.vo_head_size)
        query, key, value = (
            getattr(self, name)(hidden_states).view(*lead, -1, size).transpose(1, 2)
            for name, size in zip(self.projections, sizes, strict=True)
        )
        eager = vars(sys.modules[self.stock_class.__module__])["eager_attention_forward"]
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager
        )
        kwargs.pop("past_key_values", None)
        dropout = self.dropout.p if self.training else 0.0
        out, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        out = out.reshape(*lead, -1).contiguous()
        return (getattr(self, self.closing)(out) if self.closing else out), weights


class BiasedAttention(nn.Module):
    """HuggingFace's self-attention with the heads that are left, each with its own bias."""

    kept_heads: tuple[int, ...]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As stock; ``position_bias [batch, heads, queries, keys]`` is an untrimmed layer's."""
        if position_bias is not None:
            position_bias = position_bias[:, list(self.kept_heads)]
        return super().forward(hidden_states, attention_mask, position_bias, **kwargs)


@functools.cache
def biased_attention(stock: Any) -> type:
    """The class with heads of its own of a stock class of attention."""
    return _made(f"Trimmed{stock.__name__}", (BiasedAttention, stock), {})


def trimmed_attention(stock: type, parts: Mapping[str, Any]) -> type:
    """The class with head sizes of its own of a stock class of attention."""
    inside = f"{parts['attention']}."
    linears = [
        (path.removeprefix(inside), rows, columns)
        for path, rows, columns in parts["linears"]
        if path.startswith(inside)
    ]
    projections = [name for unit in ("qk", "vo") for name, rows, _ in linears if rows == unit]
    closing = next((name for name, _, columns in linears if columns == "vo"), None)
    return _trimmed(stock, tuple(projections), closing)


@functools.cache
def _trimmed(stock: type, projections: tuple[str, ...], closing: str | None) -> type:
    own = {"projections": projections, "closing": closing}
    return _made(f"Trimmed{stock.__name__}", (TrimmedAttention, stock), own)


def _resize(model: Any, config: Any) -> None:
    """Give every layer of a freshly built encoder the widths of ``config``."""
    parts = config.parts or PARTS[config.model_type]
    encoder = getattr(model, parts["encoder"], model)
    layers = encoder.get_submodule(parts["layers"])
    for number, width in config.widths.items():
        layer = layers[int(number)]
        here = dict(layer.named_modules())
        present = [part for part in parts["linears"] if part[0] in here]
        linears = {path: here[path] for path, _, _ in present}
        full = {unit: linears[path].in_features for path, _, unit in present if unit}
        full["qk"] = full["vo"]
        kept = {
            "qk": width["heads"] * width["qk_head_size"],
            "vo": width["heads"] * width["vo_head_size"],
            "neurons": width["neurons"],
        }
        for path, rows, columns in present:
            old = linears[path]
            across = kept[columns] if columns else old.in_features
            # A linear may hold several rows of each unit.
            along = old.out_features * kept[rows] // full[rows] if rows else old.out_features
            layer.set_submodule(path, nn.Linear(across, along, bias=old.bias is not None))
        attention = layer.get_submodule(parts["attention"])
        for name, count in parts["counts"].items():
            setattr(attention, name, {**kept, **width}[count])
        sizes = {name: width[name] for name in ("qk_head_size", "vo_head_size")}
        if set(sizes.values()) != {full["vo"] // config.num_attention_heads}:
            attention.__class__ = trimmed_attention(type(attention), parts)
            vars(attention).update(sizes)
        if "kept_heads" in width:
            kind: Any = type(attention)
            attention.__class__ = biased_attention(kind)
            vars(attention)["kept_heads"] = tuple(width["kept_heads"])


def _made(name: str, bases: tuple[type, ...], own: Mapping[str, Any]) -> Any:
    """A class that pickles find in this module; ``stock_class`` is what it was made of."""
    stock = bases[-1]
    about = {"__module__": __name__, "__doc__": f"``{stock.__name__}`` with per-layer widths."}
    globals()[name] = made = type(name, bases, {**own, **about, "stock_class": stock})
    return made


def __getattr__(name: str) -> Any:
    """``Sk`` and the name of a class of transformers: its compact class, registered."""
    stock: Any = getattr(transformers, name[2:], None) if name.startswith("Sk") else None
    kinds = (PretrainedConfig, PreTrainedModel)
    if not isinstance(stock, type) or not issubclass(stock, kinds):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register(getattr(stock, "config_class", stock))
    return compact_class(stock)
