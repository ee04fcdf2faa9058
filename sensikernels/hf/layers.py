"""The encoder layers of a model, and the family that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sensikernels._core.checks import expected, require
from sensikernels.hf.families import FAMILIES
from sensikernels.hf.family import Family, has, reach


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One encoder layer: its number, its name in the model, its module and its family."""

    index: int
    prefix: str
    module: Any
    family: Family

    @property
    def attention(self) -> Any:
        """The module that attends."""
        return self.module.get_submodule(self.family.attention)

    def linear(self, role: str) -> nn.Module:
        """``query``, ``key``, ``value``, ``attention_output``, ``intermediate`` or ``output``."""
        linear: nn.Module = self.module.get_submodule(self.family.linears[role])
        return linear

    def has(self, role: str) -> bool:
        """Whether the layer has a linear of that role."""
        path = self.family.linears.get(role)
        return path is not None and has(self.module, (path,))

    def bias(self, name: str) -> bool:
        """Whether the linear of that full module name has a bias."""
        linear: Any = self.module.get_submodule(name.removeprefix(f"{self.prefix}."))
        return linear.bias is not None

    def name(self, role: str) -> str:
        """The full module name of the linear of that role."""
        return f"{self.prefix}.{self.family.linears[role]}"


_DECODES = ("is_decoder", "is_causal", "add_cross_attention", "is_cross_attention")


def encoder_layers(model: nn.Module) -> list[Layer]:
    """The layers of the model's encoder, lowest first.

    Raises:
        UsageError: as ``all_layers``, or they are a decoder's.
    """
    layers = all_layers(model)
    for layer in layers:
        decodes = any(getattr(m, flag, False) for m in _down(layer) for flag in _DECODES)
        require(not decodes, "model", "an encoder", f"a decoder ({type(model).__name__})")
    return layers


def all_layers(model: nn.Module) -> list[Layer]:
    """The layers of the model's encoder or decoder, lowest first.

    Raises:
        UsageError: the model has no layers laid out like those of a known family, or those of
            several models, or their attention is none that is known.
    """
    found = list(_stacks(model))
    kind = type(model).__name__
    if not found:
        raise expected("model", _layouts(), kind)
    require(len(found) == 1, "model", "one encoder", f"{len(found)} in {kind}")
    root, layers, families = found[0]
    family = _knowing(families, layers)
    return [
        Layer(index=i, prefix=f"{root}.{i}", module=layer, family=family)
        for i, layer in enumerate(layers)
    ]


def family_of(model: nn.Module) -> Family:
    """The family of the model's layers. Raises UsageError as ``all_layers``."""
    return all_layers(model)[0].family


def below_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules under the lowest layer: the embeddings. Raises as ``encoder_layers``."""
    lowest = encoder_layers(model)[0]
    family = lowest.family
    root = lowest.prefix.removesuffix(f"{family.layers}.0")
    return tuple(f"{root}{name}" for name in family.below)


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList, list[Family]]]:
    """Lists of layers: name, modules, and the families that are laid out like them."""
    for name, module in model.named_modules():
        for leaf in dict.fromkeys(_leaf(family) for family in FAMILIES):
            layers = getattr(module, leaf, None)
            if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
                continue
            families = [f for f in FAMILIES if _leaf(f) == leaf and _fits(f, layers[0])]
            if families:
                yield (f"{name}.{leaf}" if name else leaf), layers, families


def _leaf(family: Family) -> str:
    return family.layers.rpartition(".")[2]


def _fits(family: Family, layer: nn.Module) -> bool:
    needed = (path for role, path in family.linears.items() if role not in family.optional)
    return has(layer, tuple(needed))


def _knowing(families: Sequence[Family], layers: nn.ModuleList) -> Family:
    """The first of ``families`` that knows the attention of every layer. Raises UsageError."""
    best, strange = -1, ""
    for family in families:
        kinds = [type(layer.get_submodule(family.attention)) for layer in layers]
        known = [_computes_alike(family, kind) for kind in kinds]
        if all(known):
            return family
        if sum(known) > best:
            best, strange = sum(known), kinds[known.index(False)].__name__
    names = dict.fromkeys(name for family in families for name in family.attentions)
    raise expected("model", f"attention of {', '.join(names)}", strange)


def _computes_alike(family: Family, kind: type[nn.Module]) -> bool:
    """Whether ``kind`` has the forward of an attention that the family knows."""
    return any(kind.forward is base.forward for base in kind.__mro__ if family.knows(base))  # type: ignore[attr-defined]


def _down(layer: Layer) -> Iterator[Any]:
    """The layer, and the modules on the way to the one that attends."""
    names = layer.family.attention.split(".")
    for depth in range(len(names) + 1):
        yield reach(layer.module, ".".join(names[:depth]))


def _layouts() -> str:
    """One family for every layout."""
    titles: dict[str, str] = {}
    for family in FAMILIES:
        titles.setdefault(f"layer.N.{next(iter(family.linears.values()))}", family.title)
    ways = (f"{title}'s ({path}, …)" for path, title in titles.items())
    return f"an encoder laid out like {' or '.join(ways)}"
