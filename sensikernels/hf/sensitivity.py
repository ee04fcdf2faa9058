"""Scores of units: estimates of how much the loss would rise if one were removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels._core.checks import require, require_one_of
from sensikernels._core.errors import UsageError
from sensikernels._core.progress import track
from sensikernels.hf.criteria import UnitTap, tap, unit_sums, unit_table
from sensikernels.hf.dropout import fast_attention
from sensikernels.hf.layers import encoder_layers
from sensikernels.hf.module_state import modes_kept
from sensikernels.hf.packed.step import unpacked
from sensikernels.hf.packed.tokens import to_padded
from sensikernels.hf.targets import structure_of
from sensikernels.masks.scores import Scores
from sensikernels.masks.structure import Coupling, Structure
from sensikernels.world import World

CRITERIA = ("mask-gradient", "learned", "first-order", "magnitude")
Batches = Iterable[Mapping[str, Tensor]]
ComputeLoss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def sensitivity(
    model: nn.Module,
    batches: Batches,
    criterion: str = "mask-gradient",
    *,
    granularity: str = "heads",
    statistic: str = "sum_batch_grad_squared",
    learning_rate: float = 2e-5,
    l1: float = 1e-4,
    compute_loss: ComputeLoss | None = None,
) -> Scores:
    """Score every unit of ``model`` on ``batches`` (dictionaries that ``model(**batch)`` takes).

    - ``mask-gradient``: Σ over batches of (∂L/∂mask)², weights frozen, no weight gradient
      computed (Kwon et al. 2022, arXiv 2204.09656; a reconstruction of Sensi-BERT, arXiv
      2307.11764). ``statistic`` says whether a batch's or each example's gradient is squared.
    - ``learned``: masks train with the weights under λ·Σ|m| (``l1``, ``learning_rate``: EarlyBERT,
      arXiv 2101.00063); |m| is the score, the weights are put back.
    - ``first-order``: Σ |w·g| over a unit's weights. - ``magnitude``: Σ |w|; needs no batch.

    ``granularity``: ``heads`` (heads and FFN neurons) or ``dimensions`` (Q/K and V/O dimensions
    and neurons). ``compute_loss``: from model and batch a scalar loss; by default the loss that the
    model's output holds, which takes labels in every batch.

    Batches may be packed; a packed model is ranked on padded tokens, to the same
    scores. The model's weights, gradients, training mode and random state are as before.
    With ``torch.distributed`` running each process gives its share of the batches, perhaps none,
    and gets the scores of all of them: a batch lies whole on one process, so they are summed.

    Raises:
        UsageError: unknown criterion, granularity or statistic; no batches, or empty ones; no loss,
            or one that is not finite; a model of no known family; ``learned`` in several
            processes, as it trains on one batch after the other.
    """
    require_one_of(criterion, "criterion", CRITERIA)
    world = World.here()
    alone = criterion != "learned" or world.size == 1
    require(alone, "criterion", "not learned in several processes", criterion)
    structure = structure_of(model, granularity)
    meter = _Meter(batches, f"sensitivity ({criterion})", _device(model), compute_loss)
    with _left_as_it_was(model), unpacked(model), fast_attention(model):
        if criterion == "magnitude":
            statistic = "sum_abs_weight"
            values = unit_sums(structure.couplings, _weights(model, structure), None, statistic)
        elif criterion == "mask-gradient":
            values = _mask_gradients(model, structure, meter, statistic)
        elif criterion == "first-order":
            values, statistic = _first_order(model, structure, meter), "sum_abs_wg"
        else:
            values, statistic = _learned(model, structure, meter, learning_rate, l1), "abs_mask"
    if criterion != "magnitude" and world.size > 1:
        world.sum_(values)
        meter.sum_over(world)
    scores = Scores(structure=structure, values=values, criterion=criterion, statistic=statistic)
    if criterion == "magnitude":
        return scores
    require(meter.rows > 0, "batches", "at least one batch", "none")
    return replace(scores, rows=meter.rows, sequence_length=meter.length)


class _Meter:
    """Moves batches to the device, keeps their geometry and takes their loss."""

    def __init__(
        self, batches: Batches, label: str, device: torch.device, compute_loss: ComputeLoss | None
    ) -> None:
        self.loss = checked_loss(compute_loss or own_loss)
        self.batches, self.label, self.device = batches, label, device
        self.rows = 0
        self.tokens = self.attended = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        total = len(self.batches) if isinstance(self.batches, Sized) else None
        for batch in map(to_padded, track(self.batches, self.label, total)):
            ids = batch.get("input_ids")
            if not isinstance(ids, Tensor) or ids.ndim < 2 or ids.numel() == 0:
                got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
                raise UsageError(
                    f"batches: expected input_ids [rows, length], not empty, in each, got {got}"
                )
            width = ids.shape[-1]
            rows = ids.numel() // width
            self.rows += rows
            self.tokens += rows * width
            self.attended += rows * width * width
            yield {
                name: value.to(self.device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }

    def sum_over(self, world: World) -> None:
        """Add up the counts of every process."""
        counts = {"": torch.tensor([self.rows, self.tokens, self.attended], dtype=torch.float64)}
        world.sum_(counts)
        self.rows, self.tokens, self.attended = (int(count) for count in counts[""])

    @property
    def length(self) -> float:
        """The padded length that makes attention FLOPs exact: Σ B·S² / Σ B·S."""
        return self.attended / max(self.tokens, 1)


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss in the model's output. Raises UsageError: there is none, as without labels."""
    forward: Callable[..., Any] = model
    out = forward(**batch)
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if not isinstance(loss, Tensor):
        raise UsageError(
            "batches: expected a loss in the model's output (labels in every batch, or "
            f"compute_loss), got none for a batch of {sorted(batch)}"
        )
    return loss


def checked_loss(compute: ComputeLoss) -> ComputeLoss:
    """``compute``, which must give one finite number."""

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        value = compute(model, batch)
        fine = value.numel() == 1 and bool(value.detach().isfinite().all())
        require(fine, "batches", "one finite loss", value.detach().flatten()[:3].tolist())
        return value

    return loss


def _mask_gradients(
    model: nn.Module, structure: Structure, meter: _Meter, statistic: str
) -> dict[str, Tensor]:
    model.eval().requires_grad_(False)
    anchor = torch.ones((), device=meter.device, requires_grad=True)
    taps = {c.name: UnitTap(c.units, statistic, meter.device) for c in structure.couplings}

    def change(coupling: Coupling) -> Callable[[Tensor], Tensor]:
        return lambda activation: tap(activation, anchor, taps[coupling.name])

    with _on_units(model, structure, change):
        for batch in meter:
            meter.loss(model, batch).backward()
    return {name: unit_tap.total.cpu() for name, unit_tap in taps.items()}


def _first_order(model: nn.Module, structure: Structure, meter: _Meter) -> dict[str, Tensor]:
    model.eval().requires_grad_(False)
    weights = _weights(model, structure)
    totals = {c.name: torch.zeros(c.units, dtype=torch.float64) for c in structure.couplings}
    for weight in weights.values():
        weight.requires_grad_(True)
    couplings, table = structure.couplings, unit_table(structure.couplings, weights)
    for batch in meter:
        grads = torch.autograd.grad(meter.loss(model, batch), list(weights.values()))
        by_name = dict(zip(weights, grads, strict=True))
        for name, sums in unit_sums(couplings, weights, by_name, "sum_abs_wg", table).items():
            totals[name] += sums
    return totals


def _learned(
    model: nn.Module, structure: Structure, meter: _Meter, learning_rate: float, l1: float
) -> dict[str, Tensor]:
    model.train()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    gates = {
        c.name: torch.ones(c.units, device=meter.device, requires_grad=True)
        for c in structure.couplings
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*trained, *gates.values()], lr=learning_rate, weight_decay=0.0)

    def change(coupling: Coupling) -> Callable[[Tensor], Tensor]:
        def gate(activation: Tensor) -> Tensor:
            wide = gates[coupling.name].repeat_interleave(coupling.unit_size)
            return activation * wide.to(activation.dtype)

        return gate

    try:
        with _on_units(model, structure, change):
            for batch in meter:
                penalty = torch.stack([g.abs().sum() for g in gates.values()]).sum()
                (meter.loss(model, batch) + l1 * penalty).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    finally:
        model.load_state_dict(before)
    return {name: gate.detach().abs().double().cpu() for name, gate in gates.items()}


@contextmanager
def _on_units(
    model: nn.Module, structure: Structure, change: Callable[[Coupling], Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Pass every coupling's activation through ``change(coupling)`` while the context lasts.

    A unit's activation is the input of the linear that loses columns; Q/K dimensions have no such
    linear, so theirs is the query's output (Σ q·∂q = Σ k·∂k).
    """
    with ExitStack() as hooks:
        for coupling in structure.couplings:
            through = change(coupling)
            consumer = next((m.module for m in coupling.members if m.axis == 1), None)
            module = model.get_submodule(consumer or coupling.members[0].module)
            if consumer is not None:
                handle = module.register_forward_pre_hook(
                    lambda _, inputs, through=through: (through(inputs[0]), *inputs[1:])
                )
            else:
                handle = module.register_forward_hook(
                    lambda _, __, output, through=through: through(output)
                )
            hooks.callback(handle.remove)
        yield


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Give back training mode, gradients, ``requires_grad`` and the random state at the end."""
    saved = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, _, _ in saved:
        parameter.grad = None  # what is there must not be added to
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), modes_kept(model):
        try:
            yield
        finally:
            for parameter, required, grad in saved:
                parameter.requires_grad_(required)
                parameter.grad = grad


def _weights(model: nn.Module, structure: Structure) -> dict[str, nn.Parameter]:
    names = {m.module for c in structure.couplings for m in c.members}
    return {name: model.get_parameter(f"{name}.weight") for name in sorted(names)}


def _device(model: nn.Module) -> torch.device:
    encoder_layers(model)
    return next(model.parameters()).device


def describe(scores: Scores) -> list[dict[str, Any]]:
    """The ranking of tensors, best first: coupling, kind, layer and score per FLOP."""
    by_name = {c.name: c for c in scores.structure.couplings}
    ranked = sorted(scores.per_tensor().items(), key=lambda item: -item[1])
    return [
        {"name": n, "kind": by_name[n].kind, "layer": by_name[n].layer, "score_per_flop": s}
        for n, s in ranked
    ]
