"""Training FLOPs of a model of which only some parameters train, product by product."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from sensikernels._core.checks import require
from sensikernels.hf.layers import Layer, below_layers, encoder_layers
from sensikernels.hf.packed.encoder import Packing
from sensikernels.hf.packed.joined import SMALL, plain
from sensikernels.hf.packed.step import packing_of
from sensikernels.hf.targets import structure_of
from sensikernels.masks import Geometry
from sensikernels.masks.structure import Coupling

_PROJECTIONS = ("query", "key", "value")
_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product of the forward pass: ``flops`` per token, at ``depth`` above the input.

    Its input's gradient costs ``backward`` times as much, and is taken where anything trains at
    ``depth`` or below; its weight's gradient costs as much as the forward, and is taken where any
    of ``weights`` trains. Attention has none.
    """

    flops: float
    depth: int
    weights: tuple[str, ...] = ()
    backward: int = 1


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Parameters whose gradients come together, as GreenTrainer's chain takes them.

    ``t_dw``: FLOPs per token of their own gradient; ``t_dy``: of bringing the gradient to their
    output from that of the next unit above.
    """

    names: tuple[str, ...]
    t_dw: float
    t_dy: float


@dataclass(frozen=True, kw_only=True)
class TrainedFlops:
    """Products of a training step, and how far above the input every parameter lies.

    Autograd takes the gradient of a product's input where something below it trains, so a step
    costs the forward of everything, the input gradients down to the lowest trained parameter, and
    the weight gradients of what trains. Biases, norms and tables cost nothing of their own.
    """

    products: tuple[Product, ...]
    depths: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: nn.Module, geometry: Geometry) -> TrainedFlops:
        """The products of ``model``, packed or padded as it is now, on batches of ``geometry``.

        Query, key and value that a packed step computes as one product have one weight gradient,
        of all three. Padded attention counts as one operator, whose backward is never done in part.

        Raises:
            UsageError: the model is of no known family; a linear lies where its costs are unknown.
        """
        return _Walk(model, geometry).result()

    def total(
        self,
        names: Iterable[str],
        *,
        shares: Mapping[str, float] = _NONE,
        ranks: Mapping[str, int] = _NONE,
    ) -> float:
        """Training FLOPs per token where the parameters of these names train.

        ``shares``: of weights in layers of their own, the part whose gradient is computed;
        ``ranks``: of weights with an adapter beside them, its rank, forward and gradients counted.
        Raises UsageError for a name that is not a parameter's, or where there is none.
        """
        trained = {*names, *shares, *ranks}
        unknown = sorted(trained - self.depths.keys())
        require(not unknown, "names", "parameters of the model", unknown[:3])
        require(bool(trained), "names", "at least one parameter", "none")
        lowest = min(self.depths[name] for name in trained)
        whole = trained.difference(ranks).union(shares)
        weights = sum(_gradient(p, whole, shares) for p in self.products)
        adapters = sum(self._adapter(name, rank, lowest) for name, rank in ranks.items())
        return self.forward() + weights + self.passed_down(lowest) + adapters

    def _adapter(self, name: str, rank: int, lowest: int) -> float:
        """FLOPs per token of an adapter beside a weight: what it computes, and both gradients."""
        product = next(p for p in self.products if name in p.weights)
        out, into = self.shapes[name]
        rows = product.flops / len(product.weights) / (2 * out * into)
        reached = lowest <= product.depth
        return rows * 2 * rank * (2 * (out + into) + out + into * reached)

    def forward(self) -> float:
        """FLOPs per token of the forward pass."""
        return sum(product.flops for product in self.products)

    def passed_down(self, depth: int) -> float:
        """FLOPs per token of the input gradients by which ``depth`` gets its own."""
        return sum(p.flops * p.backward for p in self.products if p.depth >= depth)

    def chain(self, *, above: Collection[str] = ()) -> list[Unit]:
        """All parameters but ``above``, which train anyway: units from the lowest to the highest.

        Training some units together with ``above`` costs ``total(above)``, the ``t_dw`` of each and
        the ``t_dy`` of the lowest and of all units over it, chosen or not. Raises UsageError where
        one of ``above`` lies under another parameter.
        """
        mine = [name for name in self.depths if name not in set(above)]
        places = [self.depths[name] for name in above]
        highest = max((self.depths[name] for name in mine), default=0)
        fits = highest <= min(places, default=highest)
        require(fits, "above", "parameters over all others", sorted(above)[:3])
        paid = self.passed_down(min(places)) if places else 0.0
        made: list[Unit] = []
        for names in reversed(self._together(mine)):
            reached = self.passed_down(self.depths[names[0]])
            own = sum(p.flops for p in self.products if not set(names).isdisjoint(p.weights))
            made.append(Unit(names=names, t_dw=own, t_dy=reached - paid))
            paid = reached
        return made[::-1]

    def _together(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """The names by units, lowest first; weights of one product are one unit."""
        first = {name: p.weights[0] for p in self.products for name in p.weights}
        groups: dict[str, list[str]] = {}
        for name in sorted(names, key=lambda name: self.depths[name]):
            groups.setdefault(first.get(name, name), []).append(name)
        return [tuple(group) for group in groups.values()]


def trained_flops(model: nn.Module, geometry: Geometry, names: Iterable[str]) -> float:
    """Training FLOPs per token of ``model`` where only the parameters of these names train.

    Raises UsageError as ``TrainedFlops.of`` and ``TrainedFlops.total``.
    """
    return TrainedFlops.of(model, geometry).total(names)


def _gradient(product: Product, whole: Collection[str], shares: Mapping[str, float]) -> float:
    """FLOPs per token of the gradients of a product's weights.

    Weights of which a share trains have products of their own; others share one gradient.
    """
    if shares.keys().isdisjoint(product.weights):
        return 0.0 if set(whole).isdisjoint(product.weights) else product.flops
    each = product.flops / len(product.weights)
    return each * sum(shares.get(name, float(name in whole)) for name in product.weights)


class _Walk:
    """Goes through the model's modules as they are defined, which is the order they run in.

    Depth rises by one at every linear: what comes after reads its output.
    """

    def __init__(self, model: nn.Module, geometry: Geometry) -> None:
        self.model = model
        self.each, self.length = geometry.tokens_per_sequence, geometry.mean_length
        structure = structure_of(model)
        self.structure = structure.at(geometry)
        self.first_only = any(c.sequence_flops > 0 for c in structure.couplings)
        self.reads_tokens = structure.fixed_sequence_flops == 0
        self.layers = encoder_layers(model)
        self.packing = packing_of(model)
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.products: list[Product] = []
        self.depths: dict[str, int] = {}
        self.depth = 0

    def result(self) -> TrainedFlops:
        prefixes = tuple(f"{layer.prefix}." for layer in self.layers)
        below = tuple(f"{name}." for name in below_layers(self.model))
        for name, module in self.model.named_modules():
            if f"{name}.".startswith(below):
                self._outside(name, module)
        bottom = self.depth
        for layer in self.layers:
            self._layer(layer)
        beside = self._beside_layers(below)
        for name, module in self.model.named_modules():
            if f"{name}.".startswith(beside):
                # Every layer reads it, so its gradient comes through the lowest attention.
                self._place(module, bottom + 1)
            elif not f"{name}.".startswith((*prefixes, *below)):
                self._outside(name, module)
        self._check()
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        return TrainedFlops(products=tuple(self.products), depths=self.depths, shapes=shapes)

    def _beside_layers(self, below: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the modules that lie beside the layers and are read by each of them."""
        family, root = self.layers[0].family, self.layers[0].prefix.rpartition(".")[0]
        holder, _, leaf = root.rpartition(".")
        over = {leaf, "" if family.packed is None else family.packed.closing}
        children = self.model.get_submodule(holder).named_children()
        inside = (f"{holder}.{name}.".lstrip(".") for name, _ in children if name not in over)
        return tuple(name for name in inside if name not in below)

    def _outside(self, name: str, module: nn.Module) -> None:
        """A module under or over the layers."""
        if isinstance(module, nn.Linear):
            flops = 2.0 * module.in_features * module.out_features
            flops = flops / self.each if self._once(name) else flops
            self._linear(flops, self.depth, [module])
            self.depth += 1
        self._place(module, self.depth)

    def _layer(self, layer: Layer) -> None:
        couplings = [c for c in self.structure.couplings if c.layer == layer.index]
        stages = {layer.name(role): _stage(layer, role) for role in layer.family.linears}
        base = stage = self.depth
        for name, module in layer.module.named_modules(prefix=layer.prefix):
            stage = base + stages[name] if name in stages else stage
            self._place(module, stage)
        first_only = self.first_only and layer is self.layers[-1]
        for roles in self._products_of(layer, first_only=first_only):
            linears = [layer.linear(role) for role in roles]
            flops = sum(self._flops(layer, role, first_only=first_only) for role in roles)
            self._linear(flops, base + _stage(layer, roles[0]) - 1, linears)
        attention = sum(map(self._attention, couplings))
        self.products.append(Product(flops=attention, depth=base + 1, backward=2))
        self.depth = base + max(stages.values())

    def _products_of(self, layer: Layer, *, first_only: bool) -> Iterator[tuple[str, ...]]:
        """Roles by product: those that a packed step computes as one are together."""
        roles = [role for role in layer.family.linears if layer.has(role)]
        joined = [role for role in _PROJECTIONS[first_only:] if layer.has(role)]
        if not _is_joined([layer.linear(role) for role in joined], self.packing):
            joined = []
        if joined:
            yield tuple(joined)
        yield from ((role,) for role in roles if role not in joined)

    def _flops(self, layer: Layer, role: str, *, first_only: bool) -> float:
        if role in layer.family.optional:
            return 0.0  # on a table, once a batch
        linear: Any = layer.linear(role)
        flops = 2.0 * linear.weight.numel()
        every = _stage(layer, role) == 1 and role != "query"
        return flops / self.each if first_only and not every else flops

    def _attention(self, coupling: Coupling) -> float:
        keys = coupling.key_flops + coupling.attention_flops * self.length
        return coupling.units * keys

    def _linear(self, flops: float, depth: int, linears: Sequence[nn.Module]) -> None:
        owners: list[Any] = list(linears)
        names = [self.names.get(id(owner.weight)) for owner in owners]
        known = tuple(name for name in names if name is not None)
        self.products.append(Product(flops=flops, depth=depth, weights=known))

    def _place(self, module: nn.Module, depth: int) -> None:
        for parameter in module.parameters(recurse=False):
            self.depths.setdefault(self.names[id(parameter)], depth)

    def _once(self, name: str) -> bool:
        """Whether a linear outside the layers runs once per sequence."""
        family = self.layers[0].family
        pooled = family.pooler in name or family.classifier in name.split(".")
        return pooled and not self.reads_tokens

    def _check(self) -> None:
        """Raise UsageError unless all products together are the structure's."""
        want = self.structure.flops(self.length)
        got = sum(p.flops * (1 + p.backward + (p.backward == 1)) for p in self.products)
        same = abs(got - want) <= 1e-6 * want
        require(same, "model", f"products of {want:.6g} FLOPs per token", f"{got:.6g}")


def _stage(layer: Layer, role: str) -> int:
    """1 to 4: projections of the layer's input, attention's output, and the two of the FFN."""
    rows, columns = layer.family.units()[role]
    attention = "neurons" not in (rows, columns)
    return (2 if columns else 1) if attention else (4 if columns else 3)


def _is_joined(linears: Sequence[Any], packing: Packing | None) -> bool:
    """Whether a packed training step puts these together, as ``joined.project`` decides."""
    if packing is None or not packing.fused or len(linears) < 2:
        return False
    if not all(plain(linear) and linear.bias is not None for linear in linears):
        return False
    weights = [linear.weight for linear in linears]
    return bool(weights[0].is_cuda) or sum(weight.nbytes for weight in weights) <= SMALL
