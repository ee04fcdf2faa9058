"""Checkpoints of trimmed models that load without this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sensikernels._core.checks import require, require_one_of
from sensikernels._core.errors import SensiError, UsageError
from sensikernels._core.files import writing
from sensikernels.hf.compact import OURS, built, check_compactable, compact
from sensikernels.hf.dropout import attention_before
from sensikernels.hf.family import stock_class
from sensikernels.hf.inner import rewrapped, transformer_in
from sensikernels.hf.layers import Layer, encoder_layers
from sensikernels.hf.module_state import class_of
from sensikernels.hf.swap import applied
from sensikernels.nn import MaskedLinear, SelectiveLinear

FORMS = ("stock", "compact")


@torch.no_grad()
def export(model: nn.Module, path: Path | str | None = None, *, form: str = "stock") -> nn.Module:
    """A model of plain transformers that computes what ``model`` does; ``model`` is left as it is.

    ``form="stock"``: the class and the full size that it had before it was trimmed, with zeros for
    dropped units. It loads anywhere, by ``from_pretrained`` alone, and is no faster than before.
    ``form="compact"``: as ``sensikernels.compact`` makes it. ``model``: one with a plan applied, or
    for "stock" one that was compact already; its units then come first in each layer.

    ``path``: a folder to write the checkpoint into, which appears whole or not at all. It is read
    back and compared with what is returned, to the bit.

    Raises:
        UsageError: there is no plan and the model is not compact; ``path`` is a file.
        SensiError: what was written is not what was meant, or the disk refuses.
    """
    require_one_of(form, "form", FORMS)
    target = None if path is None else Path(path)
    if target is not None:
        free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
        require(free, "path", "a new or empty folder", target)
    made: Any = compact(model) if form == "compact" else _stock(model)
    if target is not None:
        plain = transformer_in(made) is made
        require(plain, "path", "none for a wrapped model, which saves itself", target)
        with writing(target) as folder:
            made.save_pretrained(folder)
            _compare(made, type(made).from_pretrained(folder), target)
    exported: nn.Module = made
    return exported


def _stock(model: nn.Module) -> nn.Module:
    inner = transformer_in(model)
    has_plan = applied(model) is not None
    kind: Any = type(inner.config)
    if stock_class(kind) is not kind:
        return _pad(compact(model) if has_plan else model)
    if not has_plan:
        raise UsageError("model: expected a plan applied or a compact model, got neither")
    made = kind(**inner.config.to_dict())
    made._attn_implementation = attention_before(model)
    stock = built(class_of(inner), made, _whole_state(inner), inner)
    return rewrapped(model, inner, stock)


def _whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict at full size, zero where a plan drops."""
    kinds = (MaskedLinear, SelectiveLinear)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    state = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        full = {"full": True} if isinstance(layer, MaskedLinear) else {}
        linear = layer.to_linear(**full)
        state[f"{name}.weight"] = linear.weight
        if linear.bias is not None:
            state[f"{name}.bias"] = linear.bias
    return state


def _pad(small: nn.Module) -> nn.Module:
    """A compact model at full size: its own entries first in every layer, then zeros."""
    kind, family = check_compactable(small)
    inner = transformer_in(small)
    config: Any = inner.config
    ours = (*OURS, "auto_map")
    plain = {k: v for k, v in config.to_dict().items() if k not in ours}
    stock = kind.config_class.stock_class(**plain)
    stock._attn_implementation = attention_before(small)
    sizes = ("num_attention_heads", "hidden_size", "intermediate_size")
    heads, hidden, neurons = (getattr(stock, family.config_name(size)) for size in sizes)
    state = dict(inner.state_dict())
    for layer in encoder_layers(inner):
        had = config.widths[str(layer.index)]
        _grow_layer(state, layer, had, (heads, hidden // heads, neurons))
    return rewrapped(small, inner, built(kind.stock_class, stock, state, inner))


def _grow_layer(
    state: dict[str, Tensor], layer: Layer, had: Mapping[str, Any], full: tuple[int, int, int]
) -> None:
    """Bring the tensors of one layer in ``state`` to ``full`` heads, head size and neurons."""
    heads, size, neurons = full
    places = had.get("kept_heads", range(had["heads"]))
    left = {
        "qk": _Left(places, heads, had["qk_head_size"], size),
        "vo": _Left(places, heads, had["vo_head_size"], size),
        "neurons": _Left(range(had["neurons"]), neurons, 1, 1),
    }
    for role, (rows, columns) in layer.family.units().items():
        if not layer.has(role):
            continue
        for leaf in ("weight", "bias"):
            name = f"{layer.name(role)}.{leaf}"
            if rows and name in state:
                state[name] = left[rows].grown(state[name], layer.family.repeats.get(role, 1))
        if columns:
            name = f"{layer.name(role)}.weight"
            state[name] = left[columns].grown(state[name].T, 1).T


class _Left(NamedTuple):
    """Units that are left, each with ``size`` lines: their places among ``units`` of ``whole``."""

    places: Sequence[int]
    units: int
    size: int
    whole: int

    def grown(self, tensor: Tensor, repeats: int) -> Tensor:
        """``[repeats · left units · size, …]`` as ``[repeats · units · whole, …]``, else zero."""
        rest = tensor.shape[1:]
        grown = tensor.new_zeros(repeats, self.units, self.whole, *rest)
        lines = tensor.reshape(repeats, len(self.places), self.size, *rest)
        grown[:, list(self.places), : self.size] = lines
        return grown.flatten(0, 2)


def _compare(made: nn.Module, loaded: nn.Module, target: Path) -> None:
    read = loaded.state_dict()
    for name, value in made.state_dict().items():
        same = name in read and torch.equal(read[name].to(value), value)
        if not same:
            raise SensiError(f"{target}: {name}: what was read back is not what was written")
