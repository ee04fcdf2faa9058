"""LNSR: noise in a middle layer may change little above it (Hua et al. 2107.04835, 2206.05658)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sensikernels._core.checks import expected, require
from sensikernels.hf import encoder_layers, packing_of
from sensikernels.hf.layers import Layer
from sensikernels.hf.packed.layer import run_layer
from sensikernels.hf.packed.tokens import Tokens
from sensikernels.methods.base import Batch, Method, Run, option
from sensikernels.methods.streams import stream


@dataclass(kw_only=True, eq=False)
class LNSR(Method):
    """Train everything on the task's loss and ``weight · Σ_r mean((f_r(x + ε) - f_r(x))²)``.

    ``x`` is what layer b reads, at the share ``layer`` of the depth, ``f_r(x)`` what layer r ≥ b
    makes of it; ε is Gaussian, of ``sigma`` times the root mean square of x, drawn by seed, step,
    process and batch. The mean is over hidden units and the tokens that the layer computes, no
    padding: of a packed classifier's last layer, first tokens. Both passes drop out the same
    entries, and both have a gradient. Layers from b on run twice, so a step costs more than a dense
    one: the report's FLOPs and memory are those of the task's loss alone.
    """

    name = "lnsr"
    summary = "everything trains, and noise in a middle layer may change little above it"
    needs_whole_gradients = True

    layer: float = option(2 / 3, "share of the layers below the noise")
    sigma: float = option(0.05, "noise relative to the root mean square of what it is added to")
    weight: float = option(1.0, "factor of what the noise changes, for every layer above it")
    _drawn: tuple[int, int] = field(default=(-1, 0), init=False, repr=False)

    def __post_init__(self) -> None:
        require(0 <= self.layer < 1, "layer", "a share of the layers in [0, 1)", self.layer)
        require(self.sigma > 0, "sigma", "a number above 0", self.sigma)
        require(self.weight >= 0, "weight", "a number of at least 0", self.weight)

    def begin(self, run: Run) -> None:
        """Check the layers that will run twice."""
        layers = self._noisy(run)
        for layer in layers:
            recomputed = getattr(layer.module, "gradient_checkpointing", False)
            require(not recomputed, "model", "no gradient checkpointing, as layers run twice", "it")
        run.events.append(f"step 0: layers from {layers[0].index} on run twice, once on noise")

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Noise depends on the step alone."""
        self.begin(run)

    def loss(self, run: Run, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """The task's loss [] and the weighted change; the model is as it was afterwards."""
        mask = batch.get("attention_mask")
        real = None if mask is None else mask != 0
        noise = _Noise(self._generator(run), self.sigma, real)
        with _twice(run, self._noisy(run), noise):
            loss: Tensor = forward(**batch).loss
        change = torch.stack(noise.changes).sum()
        return loss + self.weight * change

    def needs_eager(self) -> str | None:
        """The noise's generator is seeded on the host."""
        return f"{self.name} draws the noise of every step from a generator of its own"

    def _noisy(self, run: Run) -> list[Layer]:
        layers = encoder_layers(run.model)
        return layers[min(round(self.layer * len(layers)), len(layers) - 1) :]

    def _generator(self, run: Run) -> torch.Generator:
        """A stream for this batch of this step on this process."""
        step, batch = self._drawn
        self._drawn = (run.step, batch + 1 if step == run.step else 0)
        device = next(run.model.parameters()).device
        return stream(device, run.seed, run.step, run.world.rank, self._drawn[1])


@dataclass(eq=False)
class _Noise:
    """The noisy pass beside a forward: its hidden states, and what they changed layer by layer.

    ``real``: bool, the tokens that are no padding, as hidden states are laid out.
    """

    generator: torch.Generator
    sigma: float
    real: Tensor | None = None
    clean: Tensor | None = None
    noisy: Tensor | None = None
    changes: list[Tensor] = field(default_factory=list)

    def through(self, run: Callable[[Tensor], Any], hidden: Tensor) -> Any:
        """``run(hidden)``, and beside it the same of the noisy hidden states."""
        if self.noisy is None:
            self.noisy = hidden + self._epsilon(hidden)
        elif hidden is not self.clean:
            raise expected("layer", "layers that read what the one below them makes", "others")
        devices = [hidden.device] if hidden.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the pass on the clean ones draws the same again
            noisy = _states(run(self.noisy))
        out = run(hidden)
        clean = _states(out)
        self.changes.append(self._chosen(noisy.float() - clean.float()).square().mean())
        self.clean, self.noisy = clean, noisy
        return out

    @torch.no_grad()
    def _epsilon(self, hidden: Tensor) -> Tensor:
        scale = self._chosen(hidden).float().square().mean().sqrt() * self.sigma
        drawn = torch.empty_like(hidden, dtype=torch.float32).normal_(generator=self.generator)
        return (drawn * scale).to(hidden.dtype)

    def _chosen(self, hidden: Tensor) -> Tensor:
        """``[tokens, hidden]`` of real tokens; all rows where a layer made first tokens alone."""
        real = self.real
        return hidden if real is None or real.shape != hidden.shape[:-1] else hidden[real]


def _states(out: Any) -> Tensor:
    states: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return states


@contextmanager
def _twice(run: Run, layers: Sequence[Layer], noise: _Noise) -> Iterator[None]:
    """Have ``layers`` run a second time on noise inside the block, packed or padded."""
    packing = packing_of(run.model)
    name = "forward" if packing is None else "packed_forward"
    with ExitStack() as undo:
        for layer in layers:
            module, before = layer.module, vars(layer.module).get(name)
            undo.callback(_put, module, name, before)
            if packing is None:
                setattr(module, name, _padded(module.forward, noise))
            else:
                own = before or partial(run_layer, packing.step.block, module)
                setattr(module, name, _packed(own, noise))
        yield


def _padded(own: Callable[..., Any], noise: _Noise) -> Callable[..., Any]:
    def forward(hidden: Tensor, *others: Any, **named: Any) -> Any:
        return noise.through(lambda states: own(states, *others, **named), hidden)

    return forward


def _packed(own: Callable[..., Any], noise: _Noise) -> Callable[..., Any]:
    def forward(hidden: Tensor, *, tokens: Tokens, **named: Any) -> Any:
        place = torch.arange(len(hidden), device=hidden.device)
        noise.real = place < tokens.cu_seqlens[-1]
        return noise.through(partial(own, tokens=tokens, **named), hidden)

    return forward


def _put(module: Any, name: str, value: Any) -> None:
    """Give ``module`` its own attribute back, or none."""
    vars(module).pop(name, None)
    if value is not None:
        setattr(module, name, value)
