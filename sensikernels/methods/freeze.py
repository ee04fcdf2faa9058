"""Freezing: embeddings and the lowest layers stay as pre-trained, so backward ends above them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sensikernels._core.checks import require
from sensikernels.hf import (
    apply,
    below_layers,
    cache_frozen_prefix,
    encoder_layers,
    packing_of,
    structure_of,
)
from sensikernels.hf.packed.prefix_cache import dropouts
from sensikernels.masks import Plan
from sensikernels.methods.base import Method, Run, option
from sensikernels.methods.parts import Parts, plan_of


def depth_of(model: nn.Module, share: float) -> int:
    """The number of layers in the encoder's lowest ``share``; all but one at most."""
    layers = len(encoder_layers(model))
    return min(round(share * layers), layers - 1)


def below(model: nn.Module, share: float) -> tuple[str, ...]:
    """Prefixes of the names of all that lies in the embeddings and the lowest ``share``."""
    lowest = (layer.prefix for layer in encoder_layers(model)[: depth_of(model, share)])
    return tuple(f"{name}." for name in (*below_layers(model), *lowest))


def frozen_lowest(model: nn.Module, share: float) -> Plan:
    """Everything trains but the embeddings and the lowest ``share`` of the layers."""
    frozen = below(model, share)
    kept = (name for name, _ in model.named_parameters() if not name.startswith(frozen))
    return Plan(method="freeze", trainable=tuple(kept), origin={"share": share})


def drop_nothing_below(model: nn.Module, share: float) -> None:
    """Switch dropout off in the embeddings and the lowest ``share`` of the layers."""
    frozen = below(model, share)
    lowest = (module for name, module in model.named_modules() if f"{name}." in frozen)
    for owner, rate in dropouts(lowest):
        setattr(owner, rate, 0.0)


@dataclass(kw_only=True, eq=False)
class Freeze(Method):
    """Train the upper layers, the pooler and the head.

    ``share`` of the layers are frozen, with the embeddings (Lee et al. 2019, arXiv 1911.03090: a
    quarter of the layers need training for nine tenths of the quality). ``cache`` keeps what the
    frozen part makes of every sentence, from the first epoch on: dropout is off there, which
    changes training a little. It needs packed tokens and one process.
    """

    name = "freeze"
    summary = "embeddings and the lowest layers are frozen, the rest trains"

    share: float = option(2 / 3, "share of the layers that is frozen, from the lowest on")
    cache: bool = option(False, "keep the output of the frozen layers for every sentence")

    def __post_init__(self) -> None:
        require(0 < self.share < 1, "share", "a share in (0, 1)", self.share)

    def begin(self, run: Run) -> None:
        """Freeze before the first step."""
        model = run.model
        if self.cache:
            require(run.world.size == 1, "cache", "one process", run.world.size)
            require(packing_of(model) is not None, "cache", "packed tokens", "padded ones")
        depth = depth_of(model, self.share)
        require(depth > 0, "share", "at least one layer's", self.share)
        upper = frozen_lowest(model, self.share)
        assert upper.trainable is not None
        run.plan = plan_of(
            run,
            self.name,
            Parts(whole=upper.trainable),
            trainable=upper.trainable,
            shapes=structure_of(model).shapes(),
            origin=upper.origin,
        )
        apply(model, run.plan, optimizer=run.optimizer)
        kept = ""
        if self.cache:
            drop_nothing_below(model, self.share)
            cache_frozen_prefix(model)
            kept = ", their output kept"
        run.events.append(f"step 0: embeddings and {depth} layers frozen{kept}")

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Freezing needs nothing but the share."""
        self.begin(run)

    def needs_eager(self) -> str | None:
        """The cache looks sentences up by their token ids."""
        return "token ids are read for the kept prefix" if self.cache else None
