"""LISA: a few encoder layers, drawn anew every so many steps, train at a time (2403.17919)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.hf import encoder_layers
from sensikernels.methods.base import Method, Run, option
from sensikernels.methods.streams import stream
from sensikernels.methods.trained import names_of, outside_layers, train_as_planned, train_only


def drawn(seed: int, number: int, layers: int, count: int) -> list[int]:
    """``count`` of ``layers`` layers, ascending, each set as likely: of interval ``number``."""
    generator = stream(torch.device("cpu"), seed, number)
    return sorted(torch.randperm(layers, generator=generator)[:count].tolist())


@dataclass(kw_only=True, eq=False)
class Lisa(Method):
    """Train embeddings, head and ``layers`` encoder layers, drawn anew every ``interval`` steps.

    Layerwise Importance Sampled AdamW (Pan et al. 2024, arXiv 2403.17919), with a uniform draw that
    depends on nothing but the seed and the interval's number. A layer that is not drawn again loses
    its moments, so the optimizer holds those of what trains. The embeddings train throughout, so
    gradients pass through all layers: of a step's FLOPs it saves the frozen layers' weight
    gradients alone.
    """

    name = "lisa"
    summary = "embeddings, head and a few layers drawn anew every so many steps train"
    needs_whole_gradients = True

    layers: int = option(2, "encoder layers that train at a time")
    interval: int = option(20, "steps from one draw to the next")

    def __post_init__(self) -> None:
        require(self.layers >= 1, "layers", "at least 1", self.layers)
        require(self.interval >= 1, "interval", "at least 1 step", self.interval)

    def begin(self, run: Run) -> None:
        """Check that there are as many layers."""
        count = len(encoder_layers(run.model))
        require(self.layers <= count, "layers", f"at most the encoder's {count}", self.layers)

    def begin_step(self, run: Run) -> None:
        """Draw at the start of every interval."""
        if run.step % self.interval:
            return
        layers = encoder_layers(run.model)
        chosen = drawn(run.seed, run.step // self.interval, len(layers), self.layers)
        prefixes = tuple(f"{layers[i].prefix}." for i in chosen)
        inside = (name for name in names_of(run.model) if name.startswith(prefixes))
        names = (*outside_layers(run.model), *inside)
        train_only(run, names, method=self.name, layers=chosen, step=run.step)
        run.events.append(f"step {run.step}: layers drawn: {', '.join(map(str, chosen))}")

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Train the layers drawn last."""
        self.begin(run)
        train_as_planned(run)
