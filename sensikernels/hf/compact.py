"""A plain, smaller HuggingFace model from an applied plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels._core.checks import expected, require
from sensikernels._core.errors import UsageError
from sensikernels.hf.aside import user_attributes
from sensikernels.hf.dropout import attention_before
from sensikernels.hf.families import FAMILIES
from sensikernels.hf.family import Family, stock_class
from sensikernels.hf.inner import rewrapped, transformer_in
from sensikernels.hf.layers import Layer, encoder_layers
from sensikernels.hf.modeling_compact import compact_class, stock_models
from sensikernels.hf.module_state import carry, class_of
from sensikernels.hf.swap import applied, restore
from sensikernels.hf.targets import attention_rows, head_sizes, shape_of
from sensikernels.nn import MaskedLinear, SelectiveLinear


@torch.no_grad()
def compact(model: nn.Module) -> nn.Module:
    """The model as a plain HF model without masks, smaller where units were trimmed.

    Trimmed models become the compact classes of their family (registered with the Auto classes;
    their saved ``config.json`` carries every layer's widths), other plans come back as the original
    class with trained entries merged. ``save_pretrained`` then ``from_pretrained`` is bit-equal.
    The given model is left as it is when trimmed, and restored when its shapes never changed. What
    is around a transformers model (SentenceTransformer) is copied around the compact one.
    Modes, ``requires_grad``, hooks, gradient checkpointing and the choice of attention carry over;
    no random number is drawn.

    Raises:
        UsageError: no plan is applied, the plan was applied with ``form="masked"``, or the
            model's class has no compact counterpart.
    """
    swap = applied(model)
    if swap is None:
        raise UsageError("model: expected a plan applied, got none")
    if not swap.plan.weight_masks:
        restore(model)
        return model
    if swap.form != "compact":
        raise UsageError(f"model: expected a plan applied as 'compact', got {swap.form!r}")
    kind, family = check_compactable(model)
    inner = transformer_in(model)
    small = built(kind, _config(model, kind, family), _plain_state(inner), inner)
    return rewrapped(model, inner, small)


def built(kind: Any, config: Any, state: Mapping[str, Tensor], model: nn.Module) -> nn.Module:
    """A ``kind(config)`` with copies of ``state`` and with all that users left on ``model``.

    No random number is drawn, and every tensor keeps its dtype and device. Raises UsageError if
    ``state`` has other names.
    """
    # The one choice of a model's constructor that its config does not hold.
    pooled = {"add_pooling_layer": False} if getattr(model, "pooler", model) is None else {}
    with torch.device("meta"):
        made: Any = kind(config, **pooled)
    strange = sorted(state.keys() ^ made.state_dict().keys())
    wanted = "transformers' own modules alone (merge adapters first)"
    require(not strange, "model", wanted, strange[:3])
    made.load_state_dict({k: v.detach().clone() for k, v in state.items()}, assign=True)
    for name, buffer in model.named_buffers():
        stem, _, leaf = name.rpartition(".")
        buffers = made.get_submodule(stem)._buffers
        if leaf in buffers:
            buffers[leaf] = buffer.clone()
    made.tie_weights()
    _carry_all(model, made)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(flags.get(name, flags.get(f"{name[:-6]}values", True)))
    twin: nn.Module = made
    return twin


def check_compactable(model: nn.Module) -> tuple[Any, Family]:
    """The class that ``compact`` makes of ``model`` once trimmed, and the model's family.

    Raises UsageError: there is none.
    """
    made_of = class_of(transformer_in(model))
    families = {
        stock: family
        for family in FAMILIES
        if family.compact is not None
        for stock in stock_models(family.compact.config).values()
    }
    stock = stock_class(made_of)
    if stock not in families:
        titles = ", ".join(family.title for family in FAMILIES if family.compact is not None)
        raise expected("model", f"transformers' own class of {titles}", made_of.__name__)
    encoder_layers(model)
    return compact_class(stock), families[stock]


def _carry_all(model: nn.Module, small: nn.Module) -> None:
    """Give every module of ``small`` the hooks, the mode and the attributes of its original."""
    for name, module in model.named_modules():
        twin = small.get_submodule(name)
        attributes = {
            key: value
            for key, value in vars(module).items()
            if key in _SWITCHES or (key not in vars(twin) and not key.startswith(_OF_A_STEP))
        }
        if isinstance(module, (MaskedLinear, SelectiveLinear)):
            attributes = user_attributes(module)
        carry(module, twin, attributes)


OURS = ("model_type", "widths", "parts")
"""What a compact model's config has of its own."""
_SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func")
_OF_A_STEP = ("_sensikernels", "packing", "prefix_cache", "labelled_head", "save_pretrained")


def _config(model: nn.Module, kind: Any, family: Family) -> Any:
    given: Any = transformer_in(model).config
    widths = {str(layer.index): _widths(layer) for layer in encoder_layers(model)}
    plain = {k: v for k, v in given.to_dict().items() if k not in OURS}
    config = kind.config_class(widths=widths, parts=family.parts(), **plain)
    config._attn_implementation = attention_before(model)
    return config


def _widths(layer: Layer) -> dict[str, Any]:
    qk_size, vo_size = head_sizes(layer.attention)
    widths: dict[str, Any] = {
        "heads": attention_rows(layer)[0] // qk_size,
        "qk_head_size": qk_size,
        "vo_head_size": vo_size,
        "neurons": shape_of(layer, "output")[1],
    }
    left = getattr(layer.attention, "kept_heads", None)
    return widths if left is None else {**widths, "kept_heads": list(left)}


def _plain_state(model: nn.Module) -> dict[str, Any]:
    """The state dict with the small tensors of compact layers under the usual names."""
    masked = _masked(model)
    state = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] not in masked}
    for name, module in masked.items():
        state[f"{name}.weight"] = module.weight
        if module.bias is not None:
            state[f"{name}.bias"] = module.bias
    return state


def _masked(model: nn.Module) -> dict[str, MaskedLinear]:
    layers: dict[str, MaskedLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, SelectiveLinear):
            raise UsageError(f"{name}: expected weight masks alone, got an update mask as well")
        if isinstance(module, MaskedLinear):
            layers[name] = module
    return layers
